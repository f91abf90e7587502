"""The replay buffer."""

import copyreg
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..streams import send
from . import arguments
from .arguments import ObservationRows, Rows, device_priorities, flags, ids, integers, priorities
from .batch import Batch, Observation
from .device_arguments import device_rows, lie_on_gpu
from .draws import DeviceDraws, DrawSequence
from .file import Reader, write
from .gpu import DeviceGather, Placement, checked_device
from .mirror import Mirror
from .options import Options, ShapeAndType, action_spec, constructor_arguments, extra_specs, key_specs
from .output import Augment, BatchWriter, Gather, OutputSpec
from .prefetch import Prefetch
from .priority_tree import PriorityTree
from .samplers import Prioritized, Sampler, as_sampler, as_seed
from .sampling import Sampling
from .storage import Storage, size_text
from .transitions import StoredTransitions, stored_rows

_ROWS_BEFORE_WARNING, _JUMPS_TO_WARN = 100, 0.1  # rows, and the share of them that are jumps


class ReplayBuffer(StoredTransitions):
    """A ring of single frames per environment, from which stacks and next observations are rebuilt.

    An observation [C * stack, H, W] is added stacked, as environments give it, and only its new frame is
    stored: about C * H * W bytes per transition instead of 2 * stack times that. What `sample` returns equals
    what `add` was given, byte for byte: also at episode starts (with any padding of the first stack),
    terminations and truncations, and where the ring starts again. A value that the dtype of its column cannot
    represent is an error; floats are rounded to it.

    Args:
        capacity: how many transitions are stored in all. Of each environment the latest capacity / num_envs
            are kept. An episode of n transitions has n + 1 frames; for these extra frames the ring has 1/32
            more slots (at least 64 KiB per environment). Only if episodes are shorter than 32 steps, len()
            stays below capacity.
        num_envs: how many environments (streams) feed the buffer.
        obs_shape: the stacked shape, e.g. (9, 84, 84); (n,) for vectors; a dict of shapes for dict
            observations.
        action_shape: shape of one action, () for discrete ones.
        frame_stack: how many frames an observation stacks, oldest first. 1 stores observations as they are.
            With a dict of shapes, an integer is for the images, and a dict gives it per key.
        n_step, gamma: sample n-step rewards, discounted by gamma. A transition can be sampled when its n
            steps, or the end of its episode, were added.
        sampler: "uniform"; "prioritized"; or "recent", which prefers what was added last. For options of the
            latter two, pass `samplers.Prioritized(...)` or `samplers.Recent(...)` instead of the name.
        device: where frames are stored and batches arrive, `index` and offsets included ("cuda" needs a build
            with CUDA kernels).
        seed: of all sampling. None draws one. Copies in forked processes and in the workers of a DataLoader
            mix it with numbers of their process, so that they draw different batches.
        extras: further values per transition, name -> shape, or name -> (shape, dtype); float32 unless given.
        obs_dtype: by default uint8 for images, which have three dimensions, or two without a stack (grey
            [H, W]), and float32 for everything else.
        action_dtype: dtype in which actions are stored.
        channels_last: images are added as [H, W, C * stack] (a dict gives it per key). They are sampled
            channels first all the same.
        on_jump: what to do if `obs` is not `next_obs` of the step before, in the middle of an episode:
            "error" raises, "cut" begins a new segment, as after `cut`. (With frame_stack=1, a new segment
            always begins.) Floats a and b that differ by rounding are equal, and come back as in `next_obs`:
            if |a - b| <= r (max(|a|, |b|) + 0.1 min(1, m)) with r = 1e-5 (float16: 2e-3) and m the largest
            magnitude in the frame. `jumps` counts such rows; if they are frequent, one warning says so.
        storage: "pinned", with device="cuda", stores frames that are too many for the GPU in pinned host
            memory; the kernel that makes a batch reads them over the bus.

    Adding, sampling and access by id may happen in different threads; each call is atomic.
    """

    def __init__(
        self,
        capacity: int,
        *,
        num_envs: int,
        obs_shape: Sequence[int] | Mapping[str, Sequence[int]],
        action_shape: Sequence[int],
        frame_stack: int | Mapping[str, int] = 1,
        n_step: int = 1,
        gamma: float = 0.99,
        sampler: Sampler = "uniform",
        device: str | torch.device = "cpu",
        seed: int | None = None,
        extras: Mapping[str, ShapeAndType] | None = None,
        obs_dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
        action_dtype: torch.dtype = torch.float32,
        channels_last: bool | Mapping[str, bool] = False,
        on_jump: Literal["error", "cut"] = "error",
        storage: Placement = "device",
    ) -> None:
        options = Options(
            capacity,
            num_envs,
            n_step,
            gamma,
            as_sampler(sampler),
            on_jump,
            key_specs(obs_shape, obs_dtype, frame_stack, channels_last),
            single=not isinstance(obs_shape, Mapping),
            action=action_spec(action_shape, action_dtype),
            extras=extra_specs(extras),
        )
        seed = as_seed(seed)
        self.device = checked_device(torch.device(device), storage)
        self.capacity = options.capacity
        self.n_step = options.n_step
        self.gamma = options.gamma
        self.sampler = options.sampler
        self._placement: Placement = storage
        pinned, on_cpu = storage == "pinned", self.device.type == "cpu"
        store = Storage(options, self.device, pinned)
        tree = None
        if isinstance(self.sampler, Prioritized):
            tree = PriorityTree(store.rows, options.num_envs, self.sampler.alpha, self.device)
        self._mirror = None if on_cpu else Mirror(store, self.device)
        if self._mirror is None:
            super().__init__(options, store, Gather())
            self._draws = DrawSequence(store.core, self.sampler, tree, seed)
        else:
            super().__init__(options, store, DeviceGather(self.device, self._mirror, pinned))
            self._draws = DeviceDraws(store.core, self.sampler, tree, seed, self._mirror)
        if tree is not None:
            tree.connect(self._mirror or store.core)
        self._batches = BatchWriter(options, self._gather)
        self._warned_of_jumps = False

    def __len__(self) -> int:
        """How many transitions are stored."""
        return int(self._core.size())

    @property
    def nbytes(self) -> int:
        """Bytes allocated for storage, frames and bookkeeping together."""
        on_device = 0 if self._mirror is None else self._mirror.nbytes
        return self._storage.nbytes + self._draws.nbytes + on_device

    @property
    def seed(self) -> int:
        """Of all sampling. A copy in another process has its own from its first batch on."""
        return self._draws.seed

    @property
    def beta(self) -> float:
        """The exponent of the importance weights, which may be set; 0 unless the sampler is prioritized."""
        return self._draws.beta

    @beta.setter
    def beta(self, value: float) -> None:
        self._draws.beta = value

    def __repr__(self) -> str:
        frames = self._storage.frame_bytes
        where = f"on {self.device}" if self._placement == "device" else f"pinned on cpu for {self.device}"
        rest = "cpu" if self.device.type == "cpu" else f"cpu and {self.device}"
        keys = self._options.keys
        shapes = ", ".join(f"{key.name} {key.shape} {str(key.dtype)[6:]} x{key.stack}" for key in keys)
        return (
            f"ReplayBuffer({len(self)}/{self.capacity} transitions of {self.num_envs} environments; "
            f"{shapes}; {type(self.sampler).__name__.lower()}, n_step={self.n_step}; "
            f"frames {size_text(frames)} {where}, the rest {size_text(self.nbytes - frames)} on {rest})"
        )

    # ---- adding ----

    def add(
        self,
        obs: ObservationRows,
        action: Rows,
        reward: Rows,
        next_obs: ObservationRows,
        terminated: Rows,
        truncated: Rows,
        *,
        env_ids: Rows | None = None,
        **extras: Rows,
    ) -> Tensor:
        """Appends one transition per row, rows [E, ...], to the streams of its environments.

        At the end of an episode `next_obs` is its final observation, not the first of the next episode.

        Rows are numpy arrays, tensors on any device, arrays of other libraries that speak dlpack, or
        sequences. On a GPU, observations that lie there already go straight into the ring: everything is
        decided by kernels on the caller's current stream, the host does not wait (unless the device is 16
        calls behind), and whatever the caller queues after may overwrite what was given. Other arguments are
        then best on that GPU, too; those in host memory are sent. Rows on a GPU go through the host, with one
        copy that it waits for, if the buffer is on the CPU, or has more than 8 observation keys or 24
        columns.

        Args:
            obs, next_obs: the stacked observations, in the dtype and layout that the buffer was built for.
            env_ids: which environment each row belongs to, each at most once. None: all of them, in order.
            **extras: the values declared as `extras`, all of them.

        Integers must be exact in their column's dtype. Floats are rounded to it, but do not become integers.
        Tensors on a GPU must have it already, or be floats that become other floats.

        Returns:
            int64 [E], the ids of the new transitions. On the GPU for rows that lie there.

        Raises:
            FrameStackError: a ValueError for an observation that contradicts its stream. Stacks are compared
                in full if frames are small (at most 4 KiB) and at episode starts and ends. At other steps,
                256 bytes in every 8 KiB of `obs` and of `next_obs` are compared, at different places in each
                frame and on each step.
            ValueError: rows of the wrong shape or dtype; a value that its column cannot represent; NaN; or
                infinity, except in extras.

            After an error, nothing was added.

            What kernels find in rows on a GPU (FrameStackError, for which they compare whole frames, NaN,
            infinity, and `env_ids` that do not exist or appear twice) is raised by a later call: by the next
            one that the host answers (such as `len`) or that changes the host's tables, or by an `add`, which
            then adds nothing. Nothing of the refused call was added; its ids are -1.
        """
        if isinstance(self._gather, DeviceGather) and lie_on_gpu(obs, self._options):
            on_device = device_rows(
                obs,
                action,
                reward,
                next_obs,
                terminated,
                truncated,
                env_ids,
                extras,
                self._options,
                self.device,
            )
            added_there = self._gather.add_tensors(on_device)
            self._warn_if_often()
            return added_there
        rows = (
            arguments.observation(obs, self._options, "obs"),
            arguments.observation(next_obs, self._options, "next_obs"),
            arguments.rewards(reward),
            flags(terminated, "terminated"),
            flags(truncated, "truncated"),
            arguments.columns(action, extras, self._options),
            None if env_ids is None else integers(env_ids, "env_ids"),
        )
        added = self._gather.add(self._storage.core, rows)
        self._warn_if_often()
        return torch.from_numpy(added)

    @property
    def jumps(self) -> int:
        """How many rows began a new segment because their `obs` was not `next_obs` of the step before. Starts
        after an episode's end or after `cut` do not count."""
        return int(self._core.jumps)

    def _warn_if_often(self) -> None:
        jumps, rows = self._storage.core.jumps, self._storage.core.rows_added
        if self._warned_of_jumps or rows < _ROWS_BEFORE_WARNING or jumps <= _JUMPS_TO_WARN * rows:
            return
        self._warned_of_jumps = True
        warnings.warn(
            f"{jumps} of {rows} rows did not continue their environment's stream: their obs is not next_obs "
            "of the step before. Each began a new segment, where n-step rewards stop, and cost one frame "
            "more. Pass as obs what was next_obs, processed alike; set terminated or truncated at the end of "
            "every episode; where environments were reset otherwise, call cut(env_ids). buffer.jumps counts "
            "such rows",
            stacklevel=3,
        )

    def cut(self, env_ids: Rows | None = None) -> None:
        """Declares that these environments (None: all) were reset outside, e.g. when a run is resumed.

        Their next row begins a new segment. The last one ends as a truncated episode would: n-step returns
        stop there and bootstrap.
        """
        envs = np.arange(self.num_envs) if env_ids is None else integers(env_ids, "env_ids")
        with self._gather.changing() as changed:
            self._core.cut(envs)
            changed(self._storage.rows_of(envs, np.maximum(self._storage.array("count")[envs] - 1, 0)))

    # ---- sampling ----

    def sample(
        self,
        batch_size: int,
        *,
        augment: Augment | None = None,
        pad: int = 4,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        out: Batch | None = None,
    ) -> Batch:
        """Draws a batch, with replacement, and rebuilds its observations in one pass.

        Args:
            batch_size: B.
            augment: "shift", DrQ's random shift: the image moved by up to `pad` pixels each way, edges
                repeated. "crop", RAD's random crop: a window of (H - 2 * pad, W - 2 * pad). "translate",
                RAD's random translation: the whole image at a random place of (H + 2 * pad, W + 2 * pad)
                black pixels. Each uses an offset in [0, 2 * pad] per row and axis, the same for all frames
                of a stack and for every image key. As in the code of their authors, next_obs has an offset
                of its own in "shift" and "crop", and that of obs in "translate": there the place of the
                image on black is visible, and so it does not change within a transition.
            dtype: of image observations: uint8 as stored; float32, bfloat16 and float16 divided by 255. Other
                observations have the dtype in which they are stored.
            memory_format: torch.channels_last writes images as NHWC (the shape stays [B, C, H, W]).
            out: an earlier batch of the same arguments (or one made like it), which is filled and returned:
                nothing is allocated. Whoever still reads it sees the new values.

        Raises:
            IndexError: nothing can be sampled yet.
            TypeError, ValueError: `out` is no batch, or has another form; it is unchanged.
        """
        spec = self._batches.spec(augment, pad, dtype, memory_format)
        if out is not None:
            self._batches.check(out, batch_size, spec)
        return self._sample(batch_size, spec, self._draws.next_number(), out)

    def sampling(
        self,
        batch_size: int,
        *,
        augment: Augment | None = None,
        pad: int = 4,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Sampling:
        """`sample` with its arguments settled, for whoever draws batches itself: `SAC.update_from` records
        sampling and update as one CUDA graph. Arguments as in `sample`."""
        _check_batch_size(batch_size)
        spec = self._batches.spec(augment, pad, dtype, memory_format)
        return Sampling(
            self._batches,
            self._draws,
            self._gather,
            spec,
            batch_size=batch_size,
            n_step=self.n_step,
            sample=lambda: self._sample(batch_size, spec, self._draws.next_number()),
            update_priorities=self.update_priorities if isinstance(self.sampler, Prioritized) else None,
        )

    def prefetch(
        self,
        batch_size: int,
        *,
        augment: Augment | None = None,
        pad: int = 4,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Prefetch:
        """An endless iterator of `sample`'s batches, each made by a thread while the one before is in use.

        Arguments as in `sample`. What is added, and priorities that change, are seen one batch later; see
        `Prefetch`. End it with `close()` or `with`.
        """
        _check_batch_size(batch_size)
        if self.device.type != "cpu":
            raise ValueError(
                f"prefetch() is for device='cpu': what sample() starts on {self.device} runs in the "
                "background anyway"
            )
        spec = self._batches.spec(augment, pad, dtype, memory_format)
        return Prefetch(self._draws.next_number, partial(self._sample, batch_size, spec))

    def _sample(self, batch_size: int, spec: OutputSpec, number: int, out: Batch | None = None) -> Batch:
        """Batch `number` of the sequence that the seed determines."""
        _check_batch_size(batch_size)
        batch = self._batches.allocate(batch_size, spec) if out is None else out
        return self._batches.batch(batch, partial(self._draws.draw, number), self.n_step, spec)

    def get(
        self,
        index: Rows,
        *,
        n_step: int | None = None,
        augment: Augment | None = None,
        pad: int = 4,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Batch:
        """The batch of these transitions, in this order; otherwise as `sample`.

        n_step is the buffer's unless given. If fewer steps have followed a transition so far, its n-step
        return is over those.

        Raises:
            IndexError: a transition was overwritten or never added.
        """
        n_step = self.n_step if n_step is None else n_step
        if n_step < 1:
            raise ValueError(f"n_step is {n_step}: it must be at least 1")
        spec = self._batches.spec(augment, pad, dtype, memory_format)
        at = ids(index)
        given = partial(self._draws.get, self._draws.next_number())
        with self._finding(at):
            batch = self._batches.allocate(len(at), spec, self._gather.ids(at))
            return self._batches.batch(batch, given, n_step, spec)

    def update_priorities(self, index: Rows, priority: Rows) -> None:
        """Sets the priorities [n], e.g. absolute TD errors, of these transitions; overwritten ones are
        skipped. On a GPU, tensors of the device are taken as they are, without waiting for them: there, a
        priority that is negative, infinite or NaN is skipped, too, instead of raising an error."""
        if not isinstance(self.sampler, Prioritized):
            raise ValueError('update_priorities() needs sampler="prioritized"')
        if self._mirror is None:
            self._core.set_priorities(*priorities(index, priority))
            return
        on_device = device_priorities(index, priority, self.device)
        with self._gather.reading():
            self._mirror.set_priorities(*on_device)

    @contextmanager
    def _finding(self, at: Tensor) -> Iterator[None]:
        """For a block in which these transitions, ids int64 [n] on the CPU, are read by kernels, which cannot
        raise IndexError. The CPU's own functions check ids themselves."""
        with self._gather.lock:
            if self._mirror is not None:
                with self._core.reading() as locked:
                    stored_rows(locked, at)
            yield

    # ---- single transitions ----

    def observations(self, index: Rows, *, dtype: torch.dtype = torch.uint8) -> Observation:
        """The observations [n, C * stack, H, W] of these transitions; dtypes as in `sample`.

        Raises:
            IndexError: a transition was overwritten (or never added). `contains` tells beforehand.
        """
        spec = self._batches.spec(None, 0, dtype, torch.contiguous_format)
        at = ids(index)
        with self._finding(at):
            return self._batches.observations(self._gather.ids(at), self._draws.observe, spec)

    def frames(self, index: Rows) -> Observation:
        """The newest single frames, [n, C, H, W] in the stored dtype, of these transitions."""
        at = ids(index)
        with self._gather.lock, self._core.reading() as locked:
            rows = stored_rows(locked, at)
            with self._gather.reading():
                found = [self._gather.frames(*where) for where in self._storage.newest_frames(rows)]
        return self._batches.join(found)

    def finished_rows(self, start: np.ndarray, stop: np.ndarray) -> tuple[Tensor, Tensor]:
        """Reward float32 [M] and end bool [M] (the episode ended, or was cut, with this step) of transitions
        start[e] .. stop[e] - 1 of every environment e, which must be stored, environment by environment; new
        tensors on the buffer's device. The host waits only if rows of device memory were added just before:
        it reads them from its own tables."""
        rows = self.span_rows(start, stop)
        reward, end = (send(torch.from_numpy(rows[name]), self.device) for name in ("reward", "end"))
        return reward, end

    # ---- saving ----

    def state_dict(self) -> dict[str, Any]:
        """{"config": what the buffer was built with, "tensors": its content, the state of sampling included}.

        The tensors share the buffer's memory: copy them, or serialize them, before adding more.
        """
        self._gather.drain()
        self._gather.start_reading()
        return self._state()

    def _state(self) -> dict[str, Any]:
        tensors = self._storage.used() | self._draws.state_dict()
        return {"config": self._options.config(), "tensors": tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes this buffer, which must have been built with the same arguments, continue as the saved
        one."""
        config, saved, tensors = self._options.config(), state["config"], state["tensors"]
        if saved != config:
            differing = [name for name in config if saved.get(name) != config[name]]
            raise ValueError(f"the state is of a buffer that was built with other values of {differing}")
        # Frames that are being sent arrive before those of the state, and those of the next add after them.
        self._gather.drain()
        with self._gather.reading():  # it locks
            parts = self._storage.parts_for({name: tensor.shape for name, tensor in tensors.items()})
            for name, own in parts.items():
                own.copy_(tensors[name])
            self._restore(tensors)

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        """After the storage was loaded."""
        with self._gather.reading():
            self._draws.load_state_dict(tensors)
            self._storage.restore_recent()
            self._gather.replaced()

    @classmethod
    def from_state_dict(
        cls, state: dict[str, Any], *, device: str | torch.device = "cpu", storage: Placement = "device"
    ) -> "ReplayBuffer":
        """A new buffer that continues as the one whose `state_dict` is given."""
        buffer = cls(**constructor_arguments(state["config"]), device=device, storage=storage)
        buffer.load_state_dict(state)
        return buffer

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything, with checksums. `path` appears, or is replaced, once the file is complete."""
        with self._gather.lock, self._core.reading():
            state = self.state_dict()
            write(path, state["config"], state["tensors"])

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        storage: Placement = "device",
    ) -> "ReplayBuffer":
        """Opens what `save` wrote; sampling continues as it would have. If the environments start afresh,
        call `cut()` before adding.

        Raises:
            ValueError: not a saved buffer, one of another format version, or a damaged one.
        """
        with open(path, "rb") as file:
            reader = Reader(file, os.fspath(path))
            buffer = cls(**constructor_arguments(reader.config), device=device, storage=storage)
            tensors = reader.read(into=buffer._storage.parts_for(reader.shapes))
        buffer._restore(tensors)
        return buffer

    def __reduce__(self) -> tuple[Any, ...]:
        with self._gather.lock, self._core.reading(), self._gather.reading():
            state = self._state()
            copies = {name: tensor.clone() for name, tensor in state["tensors"].items()}
        # Arrays are pickled by value. A tensor would be pickled, for a spawned process, as shared memory of
        # this process, which is freed together with these copies.
        state["tensors"] = {name: tensor.cpu().numpy() for name, tensor in copies.items()}
        where = {"device": str(self.device), "storage": self._placement, "drawn_in": self._draws.process}
        return copyreg.__newobj__, (type(self),), state | where  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = {name: torch.as_tensor(values, device="cpu") for name, values in state["tensors"].items()}
        device, storage = state["device"], state["storage"]
        made = self.from_state_dict({**state, "tensors": tensors}, device=device, storage=storage)
        self.__dict__.update(made.__dict__)
        self._draws.process = state["drawn_in"]


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
