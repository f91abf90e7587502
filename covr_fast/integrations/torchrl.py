"""`FastReplayBuffer` for TorchRL: `extend(tensordict)`, `sample() -> TensorDict`."""

import copy
import math
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase, unravel_key
from torch import Tensor

from ..buffer import Batch, Prioritized, ReplayBuffer
from ..buffer.samplers import Sampler
from ..files import replacing
from ..scalars import as_int
from ._torchrl_entries import Keys, NestedKey, read, text
from ._torchrl_layout import Layout
from ._torchrl_streams import Streams, in_steps

_TRAJECTORY, _MASK = ("collector", "traj_ids"), ("collector", "mask")
_STATE = "state.pt"


class FastReplayBuffer:
    """What training uses of TorchRL's TensorDictReplayBuffer, with every frame stored once.

    `sample` returns what `extend` was given, in the same shapes and dtypes, bit for bit: observations (a
    stack takes the memory of one frame) and every other entry, also nested ones, at the root and under
    "next". All tensordicts must have the entries, shapes and dtypes of the first. Only "done", "terminated"
    and "truncated" under "next" may be missing, if they follow from the others; samples have all three.
    `sample` adds "index", with a prioritized sampler "priority_weight", and with n_step > 1
    "steps_to_next_obs", which TorchRL's losses read. Entries with these names at the root are not stored.

    A float observation that equals the next observation of the step before, except for rounding, comes back
    as that one (see ReplayBuffer). With n_step > 1, the entries under "next" are those of the last of the n
    steps, except the reward: it is the sum of the discounted rewards, computed in float64 and returned in the
    reward's dtype, or computed in float32 if that is its dtype. The covr_fast.ReplayBuffer in `buffer` has
    float32 rewards; several rewards per row are summed there.

    A tensordict may be [environments, time], as collectors give it, or flat. A dimension named "time" is
    time wherever it is. In a flat tensordict, rows with the same ("collector", "traj_ids") belong together.
    Without these ids, num_envs rows are one step of every environment, and any other number of rows is one
    stretch of time. If a row does not continue its environment's stream, a new segment begins: rows come back
    right in any order, but the frames of consecutive steps are shared only if the order shows that the steps
    are consecutive.

    Calls from several threads are atomic. There are no transforms, and worker processes cannot write into the
    buffer: `extend` it with what a collector yields, or pass it to a collector that runs in one process.

    Args:
        capacity, num_envs, frame_stack, n_step, gamma, sampler, seed: as in covr_fast.ReplayBuffer.
        obs_keys: the observations' keys, nested ones as tuples: ("pixels", ("agent", "state")). frame_stack
            is for those with three dimensions.
        action_key, reward_key: where the action and, under "next", the reward are.
        batch_size: of `sample`, unless given there.
        priority_key: where `update_tensordict_priority` and `extend` find priorities: one per row, or several
            of which the largest counts.
        device: of samples. Frames stay in host memory.
        pixels_dtype: dtype of sampled uint8 images, [C, H, W] or [H, W]: uint8 as stored; float32, bfloat16
            or float16 divided by 255.

    Raises:
        TypeError, ValueError: arguments that no buffer can be built with.
    """

    def __init__(
        self,
        capacity: int,
        *,
        num_envs: int = 1,
        frame_stack: int = 1,
        n_step: int = 1,
        gamma: float = 0.99,
        sampler: Sampler = "uniform",
        obs_keys: Sequence[NestedKey] = ("pixels",),
        action_key: NestedKey = "action",
        reward_key: NestedKey = "reward",
        batch_size: int | None = None,
        priority_key: NestedKey = "td_error",
        device: torch.device | str = "cpu",
        pixels_dtype: torch.dtype = torch.uint8,
        seed: int | None = None,
    ) -> None:
        if pixels_dtype not in (torch.uint8, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"pixels_dtype is {pixels_dtype}: it must be torch.uint8, float32, bfloat16 or float16"
            )
        self.batch_size = batch_size
        self.priority_key = unravel_key(priority_key)
        self.device = torch.device(device)
        self.pixels_dtype = pixels_dtype
        self._keys = Keys.of(obs_keys, action_key, reward_key)
        # The shapes are known only from the first tensordict. The other options are checked now.
        self._frame_stack = as_int(frame_stack, "frame_stack")
        probe = ReplayBuffer(
            capacity,
            num_envs=num_envs,
            n_step=n_step,
            gamma=gamma,
            sampler=sampler,
            seed=seed,
            obs_shape=(max(1, self._frame_stack), 1, 1),
            action_shape=(),
            frame_stack=self._frame_stack,
        )
        checked = {name: getattr(probe, name) for name in ("capacity", "num_envs", "n_step", "gamma")}
        self._options: dict[str, Any] = {**checked, "sampler": probe.sampler, "seed": seed}
        self._settings = {
            **checked,
            "frame_stack": self._frame_stack,
            "sampler": repr(probe.sampler),
            "obs_keys": ", ".join(map(text, self._keys.obs)),
            "action_key": text(self._keys.action),
            "reward_key": text(self._keys.reward[1:]),
        }
        self._prioritized = isinstance(probe.sampler, Prioritized)
        self._lock = threading.RLock()
        self.empty()

    @property
    def buffer(self) -> ReplayBuffer:
        """The covr_fast.ReplayBuffer inside. IndexError before the first `extend`."""
        if self._buffer is None:
            raise IndexError("the buffer is empty: extend() it first")
        return self._buffer

    def __len__(self) -> int:
        return 0 if self._buffer is None else len(self._buffer)

    @property
    def write_count(self) -> int:
        """Transitions added so far, the overwritten ones included."""
        return 0 if self._buffer is None else int(self._buffer.stream_bounds()[2].sum())

    @property
    def _storage(self) -> Any:
        # TorchRL's collectors with worker processes ask for `_storage`.
        raise AttributeError(
            "a FastReplayBuffer has no storage that worker processes could write into: extend() it with what "
            "the collector yields"
        )

    def empty(self) -> None:
        """Forgets all transitions and which entries they had. Ids start from 0 again."""
        with self._lock:
            self._buffer: ReplayBuffer | None = None
            self._layout: Layout | None = None
            self._streams = Streams(self._options["num_envs"])

    # ---- adding ----

    def extend(self, tensordict: TensorDictBase) -> Tensor:
        """Stores [N] or [E, T] transitions; with a prioritized sampler also their priorities, if the
        tensordict has them.

        Returns:
            int64 [N] or [E * T], the ids of the transitions.

        Raises:
            TypeError: not a TensorDict, or entries that are not tensors.
            ValueError: other entries, shapes or dtypes than those of the first tensordict; NaN; infinite
                observations, actions or rewards; with frame_stack > 1, observations that are not such stacks.
                Nothing was added.
        """
        if not isinstance(tensordict, TensorDictBase):
            raise TypeError(
                f"extend() got a {type(tensordict).__name__}: it takes a TensorDict (of a tensorclass, its "
                "to_tensordict())"
            )
        entries, nested = read(tensordict)
        n = math.prod(tensordict.shape)
        if n == 0:
            return torch.empty(0, dtype=torch.int64, device="cpu")
        if _MASK in entries and not entries[_MASK].all():
            raise ValueError(
                f"{text(_MASK)} is False in some rows: they are padding. Extend with "
                f"tensordict[tensordict[{text(_MASK)}]]"
            )
        added_by_sample = {"index", "priority_weight"} if self._prioritized else {"index"}
        if self._options["n_step"] > 1:
            added_by_sample.add("steps_to_next_obs")
        for name in added_by_sample:
            entries.pop((name,), None)
        with self._lock:
            layout = self._layout or Layout.of(entries, nested, self._keys, self._options["n_step"])
            rows = layout.rows(entries, self._frame_stack)
            priority = self._priority_of(tensordict, n) if self._prioritized else None
            buffer = self._build(layout) if self._buffer is None else self._buffer
            ends = rows["terminated"] | rows["truncated"]
            streams = self._streams.of(tensordict, entries.get(_TRAJECTORY), ends)
            self._buffer, self._layout = buffer, layout
            index = np.empty(len(streams), np.int64)
            for step in in_steps(streams):
                index[step] = buffer.add(**_picked(rows, step), env_ids=streams[step])
            if priority is not None:
                buffer.update_priorities(index, priority)
        return torch.from_numpy(index)

    def add(self, tensordict: TensorDictBase) -> Tensor:
        """Stores one transition, a tensordict without batch dimensions. Returns its id."""
        if tensordict.ndim:
            raise ValueError(f"add() got a tensordict {list(tensordict.shape)}: extend() takes several rows")
        return self.extend(tensordict)[0]

    def _build(self, layout: Layout) -> ReplayBuffer:
        frame_stack = self._frame_stack
        return ReplayBuffer(
            **self._options,
            frame_stack={str(e.column): frame_stack if len(e.shape) == 3 else 1 for e in layout.obs},
            obs_shape={str(e.column): e.shape for e in layout.obs},
            obs_dtype={str(e.column): e.stored_dtype for e in layout.obs},
            action_shape=layout.action.shape,
            action_dtype=layout.action.stored_dtype,
            extras={str(e.column): (e.shape, e.stored_dtype) for e in layout.columns},
            on_jump="cut",
        )

    # ---- sampling ----

    def sample(self, batch_size: int | None = None) -> TensorDict:
        """A TensorDict [B] of transitions, drawn with replacement."""
        size = batch_size if batch_size is not None else self.batch_size
        if size is None:
            raise ValueError("batch_size is needed: give it here or when building the buffer")
        with self._lock:
            return self._tensordict(self.buffer.sample(size, dtype=self.pixels_dtype))

    def __getitem__(self, index: Tensor | np.ndarray | list[int] | int) -> TensorDict:
        """The transitions of these ids, as `extend` returned them and samples have them in "index".

        Raises:
            IndexError: a transition was overwritten or never added.
        """
        if isinstance(index, slice | str | tuple):
            raise TypeError(f"index is {index!r}: it must be ids, as extend() returns them")
        ids = torch.as_tensor(index, device="cpu")
        with self._lock:
            found = self._tensordict(self.buffer.get(ids.reshape(-1), dtype=self.pixels_dtype))
        return found.reshape(ids.shape) if ids.ndim else found[0]

    def _tensordict(self, batch: Batch) -> TensorDict:
        assert self._layout is not None
        return self._layout.tensordict(batch, self.buffer).to(self.device)

    def __iter__(self) -> Iterator[TensorDict]:
        """Samples without end."""
        while True:
            yield self.sample()

    # ---- priorities ----

    def update_tensordict_priority(self, tensordict: TensorDictBase) -> None:
        """Sets the priorities of sampled transitions to those in `priority_key`. If the entry is missing,
        priorities stay, with a warning. Without a prioritized sampler it does nothing, as in TorchRL."""
        if not self._prioritized:
            return
        index = tensordict.get("index", None)
        if index is None:
            raise ValueError('the tensordict lacks "index": sample() gives it')
        priority = self._priority_of(tensordict, index.numel())
        if priority is None:
            warnings.warn(
                f"the tensordict lacks priority_key={self.priority_key!r}: priorities stay as they were",
                stacklevel=2,
            )
            return
        self.update_priority(index, priority)

    def update_priority(self, index: Tensor | np.ndarray, priority: Tensor | np.ndarray) -> None:
        """Sets the priorities [n] of the transitions with these ids [n]; overwritten ones are skipped.

        Raises:
            ValueError: the sampler is not prioritized.
        """
        with self._lock:
            self.buffer.update_priorities(torch.as_tensor(index, device="cpu").reshape(-1), priority)

    def _priority_of(self, tensordict: TensorDictBase, n: int) -> Tensor | None:
        found = tensordict.get(self.priority_key, None)
        if found is None:
            return None
        priority: Tensor = found.detach().cpu()
        if priority.numel() == 0 or priority.numel() % n:
            raise ValueError(
                f"{self.priority_key!r} has shape {tuple(priority.shape)}: it must hold priorities of {n} "
                "rows"
            )
        priority = priority.reshape(n, -1).double().abs().amax(1)
        if not torch.isfinite(priority.float()).all():
            raise ValueError(
                f"{self.priority_key!r} is NaN or infinite, or beyond float32: priorities stay as they were"
            )
        return priority

    # ---- saving ----

    def state_dict(self) -> dict[str, Any]:
        """A copy of the content, made of tensors and plain Python objects only, so that `torch.load` opens it
        with weights_only=True."""
        with self._lock:
            return {
                "settings": dict(self._settings),
                "layout": None if self._layout is None else self._layout.state_dict(),
                "buffer": None if self._buffer is None else _copied(self._buffer),
                "streams": self._streams.state_dict(),
            }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues as the saved buffer would have. `device`, `batch_size`, `priority_key` and `pixels_dtype`
        of this buffer stay.

        Raises:
            ValueError: not a state, or that of a buffer with other settings, or with other entries than this
                one already has. The buffer is as before.
        """
        if not isinstance(state, dict) or not {"settings", "buffer", "streams"} <= state.keys():
            raise ValueError("the state is not one of FastReplayBuffer: state_dict() makes them")
        with _saying_damaged():
            differing = [
                f"{name}={state['settings'].get(name)!r}, this one has {value!r}"
                for name, value in self._settings.items()
                if state["settings"].get(name) != value
            ]
        if differing:
            raise ValueError(
                f"the state is of a buffer with {'; '.join(differing)}: build the buffer with those settings"
            )
        with _saying_damaged():
            layout = None if state["layout"] is None else Layout.from_state(state["layout"])
            buffer = None if layout is None else _restored(state["buffer"], layout)
            streams = Streams.from_state(self._options["num_envs"], state["streams"])
        with self._lock:
            if self._layout is not None and layout is not None:
                self._layout.check_same(layout)
            self._buffer, self._layout, self._streams = buffer, layout, streams

    def dumps(self, path: str | os.PathLike[str]) -> None:
        """Writes `state_dict` into the folder `path`, which is created if it does not exist."""
        Path(path).mkdir(parents=True, exist_ok=True)
        with replacing(Path(path) / _STATE) as file:
            torch.save(self.state_dict(), file)

    def loads(self, path: str | os.PathLike[str]) -> None:
        """`load_state_dict` of what `dumps` wrote into the folder `path`."""
        self.load_state_dict(torch.load(Path(path) / _STATE, map_location="cpu", weights_only=True))

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:  # what can change is copied now, before other threads change it
            state = {**self.__dict__, "_streams": copy.deepcopy(self._streams)}
            state["_buffer"] = None if self._buffer is None else self._buffer.__reduce__()[2]
            del state["_lock"]
            return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()
        if state["_buffer"] is not None:
            self._buffer = ReplayBuffer.__new__(ReplayBuffer)
            self._buffer.__setstate__(state["_buffer"])


def _picked(rows: dict[str, Any], step: np.ndarray) -> dict[str, Any]:
    """The arguments of `ReplayBuffer.add` for some of the rows."""
    return {name: _picked(v, step) if isinstance(v, dict) else v[step] for name, v in rows.items()}


@contextmanager
def _saying_damaged() -> Iterator[None]:
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"the state is damaged ({type(error).__name__}: {error})") from error


def _copied(buffer: ReplayBuffer) -> dict[str, Any]:
    state = buffer.state_dict()
    tensors = {name: tensor.clone() for name, tensor in state["tensors"].items()}
    return {**state, "tensors": tensors, "device": "cpu", "storage": "device"}


def _restored(state: dict[str, Any], layout: Layout) -> ReplayBuffer:
    """A buffer of a state, whose tensors may be on any device."""
    tensors = {name: tensor.cpu() for name, tensor in state["tensors"].items()}
    buffer = ReplayBuffer.from_state_dict({**state, "tensors": tensors})
    config = state["config"]
    if config["obs_shape"].keys() != {e.column for e in layout.obs} or config["extras"].keys() != {
        e.column for e in layout.columns
    }:
        raise ValueError("its layout is that of another buffer")
    for name, own in buffer.state_dict()["tensors"].items():
        saved = tensors[name]
        if (own.shape, own.dtype) != (saved.shape, saved.dtype):
            raise ValueError(
                f"{name!r} is {saved.dtype} {tuple(saved.shape)}, not {own.dtype} {tuple(own.shape)}"
            )
    return buffer
