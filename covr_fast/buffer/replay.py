"""The replay buffer."""

import copyreg
import os
import secrets
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .. import _C
from ..border import CPU, address
from ..scalars import as_float, as_int
from . import file as io
from . import processes
from .arguments import Rows, as_array, flags, ids, integers, observation_rows, shaped, stored_rows
from .batch import Batch, Observation
from .gpu import DeviceGather, check_device
from .observation import ShapeAndType, as_name, as_shape, key_specs, numpy_dtype, shape_and_dtype
from .output import Augment, Form
from .prefetch import Prefetch
from .samplers import Prioritized, PriorityTree, Recent, Sampler, Uniform, as_sampler
from .storage import Storage, size_text

_ARGUMENTS_OF_ADD = {"obs", "action", "reward", "next_obs", "terminated", "truncated", "env_ids", "self"}
_REWARD = np.dtype(np.float32)
_TERMINATED, _END = np.uint8(1), np.uint8(3)  # flags of csrc/replay.h; kEnd without kCut
_TRUNCATED = np.uint8(2)

_JUMPS_SEEN, _JUMPS_RARE = 100, 0.1  # rows before jumps are judged, and the share that is no news

ObservationRows = Rows | Mapping[str, Rows]


class ReplayBuffer:
    """A ring of single frames per environment, from which stacks and next observations are rebuilt.

    An observation [C * stack, H, W] arrives stacked, as environments give it, and its one new frame is
    stored: about C * H * W bytes per transition instead of 2 * stack times that. What comes out of `sample`
    equals what went into `add`, byte for byte, at episode starts (whatever the first stack is padded with),
    terminations, truncations, and across the ring's seam. What a column's dtype cannot hold is refused;
    floats are rounded to it.

    Args:
        capacity: transitions held in all. Environment e keeps its latest capacity / num_envs; the oldest goes
            first. An episode of n transitions has n + 1 frames, and 1/32 of the ring (at least 64 KiB per
            environment) is there for them: only where episodes are shorter than 32 steps does len() settle
            below capacity.
        num_envs: how many environments (streams) feed the buffer.
        obs_shape: the stacked shape, e.g. (9, 84, 84); (n,) for vectors; a dict of shapes for dict
            observations.
        action_shape: shape of one action, () for discrete ones.
        frame_stack: how many frames an observation stacks, oldest first. 1 stores observations as they are.
            In a dict of shapes, an integer means the images; a dict says it per key.
        n_step, gamma: sample n-step rewards, discounted by gamma. A transition can be sampled once its n
            steps (or its episode's end) are there.
        sampler: "uniform"; "prioritized"; or "recent", which prefers what was added last. For options of the
            latter two, pass `samplers.Prioritized(...)` or `samplers.Recent(...)` instead of the name.
        device: where frames live and batches arrive ("cuda" needs a build with CUDA kernels). `index` and the
            offsets of a batch stay on the CPU.
        seed: of all sampling. None draws one. Copies in forked processes and in the workers of a DataLoader
            mix it with what tells these apart, so they draw batches of their own.
        extras: further values per transition, name -> shape, or name -> (shape, dtype); float32 unless given.
        obs_dtype: uint8 for images, which have three dimensions, or two without a stack (grey [H, W]), and
            float32 for the rest unless given.
        action_dtype: dtype that actions are stored in.
        channels_last: images arrive as [H, W, C * stack] (a dict says it per key). They are sampled channels
            first all the same.
        on_jump: what to do where `obs` is not `next_obs` of the step before, in the middle of an episode:
            refuse it, or take it for the start of a new segment, as after `cut`. (With frame_stack=1 it
            always is one.) Floats a and b that differ by rounding are equal, and come back as in `next_obs`:
            if |a - b| <= r (max(|a|, |b|) + 0.1 min(1, m)) with r = 1e-5 (float16: 2e-3) and m the largest
            magnitude in the frame. `jumps` counts, and a warning says so once if they are frequent.
        storage: "pinned", with device="cuda", keeps frames that are too many for the GPU in pinned host
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
        storage: Literal["device", "pinned"] = "device",
    ) -> None:
        capacity, num_envs = as_int(capacity, "capacity"), as_int(num_envs, "num_envs")
        n_step, gamma = as_int(n_step, "n_step"), as_float(gamma, "gamma")
        seed = None if seed is None else as_int(seed, "seed")
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}: it must be at least 1")
        if capacity < num_envs:
            raise ValueError(f"capacity is {capacity}: it must be at least num_envs = {num_envs}")
        if not 1 <= n_step <= capacity // num_envs:
            raise ValueError(
                f"n_step is {n_step}: it must lie between 1 and the {capacity // num_envs} transitions "
                "that the buffer holds per environment"
            )
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"gamma is {gamma}: it must lie in [0, 1]")
        if on_jump not in ("error", "cut"):
            raise ValueError(f"on_jump is {on_jump!r}: it must be 'error' or 'cut'")
        if seed is not None and not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}: it must lie in [0, 2**63)")
        self.capacity = capacity
        self.num_envs = num_envs
        self.n_step = n_step
        self.gamma = gamma
        self.sampler = as_sampler(sampler)
        self.beta = self.sampler.beta if isinstance(self.sampler, Prioritized) else 0.0
        self.device = torch.device(device)
        if storage not in ("device", "pinned"):
            raise ValueError(f"storage is {storage!r}: it must be 'device' or 'pinned'")
        check_device(self.device, storage == "pinned")
        self._placement = storage
        self.seed = secrets.randbits(63) if seed is None else seed
        self._drawn_in = processes.here()
        self._batches_drawn = 0
        self._counting = threading.Lock()
        self._keys = key_specs(obs_shape, obs_dtype, frame_stack, channels_last)
        self._single = not isinstance(obs_shape, Mapping)
        self._extras = {
            as_name(name, "extras"): shape_and_dtype(spec, f"extras[{name!r}]")
            for name, spec in (extras or {}).items()
        }
        if taken := self._extras.keys() & _ARGUMENTS_OF_ADD:
            raise ValueError(f"extras has {sorted(taken)}: add() has arguments of that name, choose others")
        self._columns = {"action": (as_shape(action_shape, "action_shape"), action_dtype), **self._extras}
        self._numpy_types = {
            name: numpy_dtype(dtype, "action_dtype" if name == "action" else f"the dtype of extras[{name!r}]")
            for name, (_, dtype) in self._columns.items()
        }
        self._pool = _C.OutputPool()
        self._forms: dict[tuple, Form] = {}
        pinned = storage == "pinned"
        self._storage = Storage(
            capacity, num_envs, self._keys, self._columns, n_step, gamma, self.device, pinned
        )
        self._core = self._storage.core
        self._core.cut_at_jumps = on_jump == "cut"
        self._jumps_said = False
        self._gpu: DeviceGather | None = None
        if self.device.type == "cuda":
            self._gpu = DeviceGather(self.device, self._storage, self._keys, pinned)
        self._priorities: PriorityTree | None = None
        if isinstance(self.sampler, Prioritized):
            self._priorities = PriorityTree(self._core, self._storage.rows, num_envs, self.sampler.alpha)
        options = {} if self._gpu is None else {"pin_memory": True}
        # Makers of tensors [*sizes] by dtype, for what `sample` fills: dtype and device are settled here.
        self._new: dict[torch.dtype, Callable[..., Tensor]] = {
            dtype: partial(torch.empty(0, dtype=dtype, device=CPU).new_empty, **options)
            for dtype in (torch.float32, torch.bool, *(dtype for _, dtype in self._columns.values()))
        }
        # The C++ core locks by itself; kernel launches that belong together with it need one more.
        self._lock: AbstractContextManager = nullcontext() if self._gpu is None else threading.Lock()

    def __len__(self) -> int:
        """Transitions held."""
        return self._core.size()

    @property
    def nbytes(self) -> int:
        """Bytes allocated for storage, frames and bookkeeping together."""
        return self._storage.nbytes + (0 if self._priorities is None else self._priorities.nbytes)

    def __repr__(self) -> str:
        frames = self._storage.frame_bytes
        where = f"on {self.device}" if self._placement == "device" else f"pinned on cpu for {self.device}"
        shapes = ", ".join(f"{key.name} {key.shape} {str(key.dtype)[6:]} x{key.stack}" for key in self._keys)
        return (
            f"ReplayBuffer({len(self)}/{self.capacity} transitions of {self.num_envs} environments; "
            f"{shapes}; {type(self.sampler).__name__.lower()}, n_step={self.n_step}; "
            f"frames {size_text(frames)} {where}, the rest {size_text(self.nbytes - frames)} on cpu)"
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

        Args:
            obs, next_obs: the stacked observations, in the dtype and layout the buffer was built for.
            env_ids: which environment each row belongs to, each at most once. None: all of them, in order.
            **extras: the values declared as `extras`, all of them.

        Integers must be exact in their column's dtype. Floats are rounded to it, but do not become integers.

        Returns:
            int64 [E], the ids of the new transitions.

        Raises:
            ValueError: rows of the wrong shape or dtype; a value that its column cannot hold; NaN, or outside
                of extras infinity; or an observation that contradicts its stream. Nothing was added then.
                Stacks are compared in full where frames are small (at most 4 KiB) and at episode starts and
                ends; in between by 256 bytes in every 8 KiB of `obs` and as much of `next_obs`, at other
                places in each frame and on each step.
        """
        if extras.keys() != self._extras.keys():
            raise ValueError(f"add() got the extras {sorted(extras)}, declared are {sorted(self._extras)}")
        rows = (
            self._observation_rows(obs, "obs"),
            self._observation_rows(next_obs, "next_obs"),
            stored_rows(reward, _REWARD, "reward", ""),
            flags(terminated, "terminated"),
            flags(truncated, "truncated"),
            [
                stored_rows(action, self._numpy_types["action"], "action", "action_dtype"),
                *(self._extra_rows(name, extras[name]) for name in self._extras),
            ],
            None if env_ids is None else integers(env_ids, "env_ids"),
            self.num_envs,
        )
        with self._lock:
            if self._gpu:
                self._gpu.before_add()
            added = self._core.add(*rows)
            if self._gpu:
                self._gpu.after_add()
        if (jumps := self._core.jumps) and not self._jumps_said:
            self._warn_if_often(jumps, self._core.rows_added)
        return torch.from_numpy(added)

    @property
    def jumps(self) -> int:
        """How many rows that this object was given began a new segment because their `obs` was not `next_obs`
        of the step before. Starts after an episode's end or after `cut` are none."""
        return self._core.jumps

    def _warn_if_often(self, jumps: int, rows: int) -> None:
        if rows < _JUMPS_SEEN or jumps <= _JUMPS_RARE * rows:
            return
        self._jumps_said = True
        warnings.warn(
            f"{jumps} of {rows} rows did not continue their environment's stream: their obs is not next_obs "
            "of the step before. Each began a new segment, where n-step rewards stop, and cost one frame "
            "more. Pass as obs what was next_obs, processed alike; set terminated or truncated at the end of "
            "every episode; where environments were reset otherwise, call cut(env_ids). buffer.jumps counts "
            "such rows",
            stacklevel=3,
        )

    def _extra_rows(self, name: str, values: Rows) -> np.ndarray:
        declared_by = f"dtype of extras[{name!r}]"
        return stored_rows(values, self._numpy_types[name], name, declared_by, infinite=True)

    def _observation_rows(self, observation: ObservationRows, what: str) -> list[np.ndarray]:
        if self._single:
            return [observation_rows(observation, self._keys[0], what)]  # type: ignore[arg-type]
        if not isinstance(observation, Mapping):
            raise ValueError(f"{what} must be a dict with the keys {[key.name for key in self._keys]}")
        missing = [key.name for key in self._keys if key.name not in observation]
        if missing:
            raise ValueError(f"{what} lacks the keys {missing}")
        return [observation_rows(observation[key.name], key, f"{what}[{key.name!r}]") for key in self._keys]

    def cut(self, env_ids: Rows | None = None) -> None:
        """Declares that these environments (None: all) were reset outside, e.g. when a run is resumed.

        Their next row begins a new segment. The last one ends as a truncated episode would: n-step returns
        stop there and bootstrap.
        """
        self._core.cut(None if env_ids is None else integers(env_ids, "env_ids"), self.num_envs)

    # ---- sampling ----

    def sample(
        self,
        batch_size: int,
        *,
        augment: Augment | None = None,
        pad: int = 4,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Batch:
        """Draws a batch, with replacement, and rebuilds its observations in one pass.

        Args:
            batch_size: B.
            augment: "shift", DrQ's random shift: the picture moved by up to `pad` pixels each way, edges
                repeated. "crop", RAD's random crop: a window of (H - 2 * pad, W - 2 * pad). Both use an
                offset in [0, 2 * pad] per row and axis, one for obs and an independent one for next_obs, and
                the same for every image key.
            dtype: of image observations. uint8 as stored; float32, bfloat16 and float16 divided by 255. Other
                observations keep theirs.
            memory_format: torch.channels_last writes images as NHWC (the shape stays [B, C, H, W]).

        Raises:
            IndexError: nothing can be sampled yet.
        """
        form = self._form(augment, pad, dtype, memory_format)
        return self._sample(self._next_number(), batch_size, form)

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

        Arguments as in `sample`. Batches are one behind what is added and what priorities become in the
        meantime; see `Prefetch`. End it with `close()` or `with`.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
        if self._gpu is not None:
            raise ValueError(
                f"prefetch() is for device='cpu': what sample() starts on {self.device} runs in the "
                "background anyway"
            )
        return Prefetch(self, batch_size, self._form(augment, pad, dtype, memory_format))

    def _sample(self, number: int, batch_size: int, form: Form) -> Batch:
        """Batch `number` of the sequence that the seed determines."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
        index = torch.empty(batch_size, dtype=torch.int64, device=CPU)
        return self._gather(index, partial(self._draw, number), self.n_step, form)

    def _draw(self, number: int, request: Any, threads: int) -> None:
        if self._priorities is not None:
            self._core.sample_prioritized(request, self.seed, number, self.beta, threads)
        elif isinstance(self.sampler, Recent):
            recency, floor = self.sampler.eta**1000, self.sampler.floor
            self._core.sample(request, self.seed, number, recency, floor, threads)
        else:
            self._core.sample(request, self.seed, number, 1.0, 1, threads)

    def _next_number(self) -> int:
        with self._counting:
            if (here := processes.here()) != self._drawn_in:
                self._drawn_in = here
                mixed = np.random.SeedSequence([self.seed, *here]).generate_state(1, np.uint64)
                self.seed = int(mixed[0]) >> 1
            self._batches_drawn += 1
            return self._batches_drawn - 1

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

        n_step is the buffer's unless given. Where fewer steps have followed a transition so far, its n-step
        return covers those.

        Raises:
            IndexError: a transition was overwritten or never added.
        """
        n_step = self.n_step if n_step is None else n_step
        if n_step < 1:
            raise ValueError(f"n_step is {n_step}: it must be at least 1")
        form = self._form(augment, pad, dtype, memory_format)
        number = self._next_number()
        return self._gather(
            ids(index).clone(),
            lambda request, threads: self._core.get(request, self.seed, number, threads),
            n_step,
            form,
        )

    def update_priorities(self, index: Rows, priority: Rows) -> None:
        """Sets the priorities [n], e.g. absolute TD errors, of these transitions; overwritten ones are
        skipped."""
        if self._priorities is None:
            raise ValueError('update_priorities() needs sampler="prioritized"')
        at, values = ids(index), as_array(priority)
        if values.dtype.kind not in "biuf":
            raise ValueError(f"priority has dtype {values.dtype}: it must be floating")
        if values.ndim > 1 and values.shape not in ((len(at), 1), np.shape(index)):
            raise ValueError(f"priority has shape {values.shape}: it must be {(len(at),)}, one per index")
        self._core.set_priorities(at.numpy(), values.astype(np.float64, copy=False).reshape(-1))

    def _form(
        self, augment: Augment | None, pad: int, dtype: torch.dtype, memory_format: torch.memory_format
    ) -> Form:
        options = (augment, pad, dtype, memory_format)
        form = self._forms.get(options)
        if form is None:
            form = self._forms[options] = Form(self._keys, *options)
        return form

    def _gather(self, index: Tensor, draw: Callable[[Any, int], None], n_step: int, form: Form) -> Batch:
        """The batch of the ids that `draw(request, threads)` puts into `index`, or finds there."""
        n = len(index)
        floats, bools = self._new[torch.float32], self._new[torch.bool]
        reward, discount, weight = floats(n), floats(n), floats(n)
        terminated, truncated = bools(n), bools(n)
        columns = {name: self._new[kind](n, *shape) for name, (shape, kind) in self._columns.items()}
        offsets = index.new_empty(2, n, 2) if form.offset_range else None
        request = _C.BatchOut(
            n,
            n_step,
            address(index, torch.int64),
            address(reward, torch.float32),
            address(discount, torch.float32),
            address(terminated, torch.bool),
            address(truncated, torch.bool),
            address(weight, torch.float32),
            [address(columns[name], kind) for name, (_, kind) in self._columns.items()],
            0 if offsets is None else address(offsets, torch.int64),
            form.offset_range,
            form.shift_origin,
        )
        obs, next_obs = self._allocate(form, n), self._allocate(form, n)
        if self._gpu is None:
            for key in zip(form.targets, form.addresses(obs), form.addresses(next_obs), strict=True):
                request.add_key(*key)
        with self._lock:
            draw(request, torch.get_num_threads())
            if self._gpu:
                self._gpu.gather(request, n, form, obs, next_obs)
        if self._gpu:
            columns = {name: self._arrive(values) for name, values in columns.items()}
            reward, discount, weight = map(self._arrive, (reward, discount, weight))
            terminated, truncated = self._arrive(terminated), self._arrive(truncated)
        return Batch(
            obs=self._join(obs),
            action=columns.pop("action"),
            reward=reward,
            next_obs=self._join(next_obs),
            discount=discount,
            terminated=terminated,
            truncated=truncated,
            index=index,
            weight=weight,
            extras=columns,
            obs_offset=None if offsets is None else offsets[0],
            next_obs_offset=None if offsets is None else offsets[1],
        )

    def _arrive(self, values: Tensor) -> Tensor:
        return values.to(self.device, non_blocking=True)

    def _allocate(self, form: Form, n: int) -> list[Tensor]:
        return form.allocate(n, self._pool) if self._gpu is None else form.allocate_on(self.device, n)

    def _join(self, observation: Sequence[Tensor]) -> Observation:
        if self._single:
            return observation[0]
        return {key.name: values for key, values in zip(self._keys, observation, strict=True)}

    # ---- single transitions ----

    def observations(self, index: Rows, *, dtype: torch.dtype = torch.uint8) -> Observation:
        """The observations [n, C * stack, H, W] of these transitions; dtypes as in `sample`.

        Raises:
            IndexError: a transition was overwritten (or never added). `contains` tells beforehand.
        """
        at = ids(index)
        form = self._form(None, 0, dtype, torch.contiguous_format)
        out = self._allocate(form, len(at))
        request = _C.BatchOut(len(at), 1, address(at, torch.int64), 0, 0, 0, 0, 0, [], 0, 0, 0)
        if self._gpu is None:
            for target, to in zip(form.targets, form.addresses(out), strict=True):
                request.add_key(target, to, 0)
        with self._lock:
            self._core.observe(request, torch.get_num_threads())
            if self._gpu:
                self._gpu.gather(request, len(at), form, out, [])
        return self._join(out)

    def frames(self, index: Rows) -> Observation:
        """The newest single frames, [n, C, H, W] in the stored dtype, of these transitions."""
        out = []
        with self._lock, self._core.reading() as held:
            rows = _held_rows(held, index)
            if self._gpu:
                self._gpu.begin_read()
            for key in self._keys:
                frames = self._storage.tensors[f"frames.{key.name}"]
                slots = self._storage.tensors[f"newest.{key.name}"][rows] % frames.shape[1]
                at = rows // self._storage.rows_per_stream, slots
                if frames.is_cuda:  # indices in ordinary memory would make the host wait for the stream
                    at = self._arrive(at[0].pin_memory()), self._arrive(at[1].pin_memory())
                found = frames[at]
                sent = self._gpu is not None and not found.is_cuda
                out.append(self._arrive(found.pin_memory()) if sent else found)
            if self._gpu:
                self._gpu.end_read()
        return self._join(out)

    def actions(self, index: Rows) -> Tensor:
        """The actions [n, *action_shape] of these transitions."""
        with self._core.reading() as held:
            return self._storage.tensors["column.action"][_held_rows(held, index)]

    def extras(self, index: Rows) -> dict[str, Tensor]:
        """The extras, each [n, *shape], of these transitions."""
        with self._core.reading() as held:
            rows = _held_rows(held, index)
            return {name: self._storage.tensors[f"column.{name}"][rows] for name in self._extras}

    def set_extras(self, index: Rows, **values: Rows) -> None:
        """Overwrites extras of these transitions, e.g. with a prior that arrives after its step."""
        if unknown := values.keys() - self._extras.keys():
            raise ValueError(f"set_extras() got {sorted(unknown)}, declared are {sorted(self._extras)}")
        at = ids(index)
        new = {
            name: shaped(self._extra_rows(name, value), (len(at), *self._extras[name][0]), name)
            for name, value in values.items()
        }
        with self._core.writing() as held:
            rows = _held_rows(held, at).numpy()
            for name, value in new.items():
                self._storage.tensors[f"column.{name}"].numpy()[rows] = value

    def set_terminated(self, index: Rows, terminated: Rows) -> None:
        """Corrects afterwards which of these transitions [n] ended their episode: True terminates those that
        did not end, False takes back any end. What follows in the stream stays as it was added."""
        at, stored = ids(index), self._storage.tensors["flags"].numpy()
        end = shaped(flags(terminated, "terminated"), (len(at),), "terminated")
        with self._core.writing() as held:
            rows = _held_rows(held, at).numpy()
            ended = stored[rows] & _END
            stored[rows] = np.where(end, np.where(ended, ended, _TERMINATED), 0) | stored[rows] & ~_END

    def set_truncated(self, index: Rows, truncated: Rows) -> None:
        """Corrects afterwards which of these transitions [n] were truncated: True truncates them, also those
        that terminated; False turns a truncation into a termination. Otherwise as `set_terminated`."""
        at, stored = ids(index), self._storage.tensors["flags"].numpy()
        now = shaped(flags(truncated, "truncated"), (len(at),), "truncated")
        with self._core.writing() as held:
            rows = _held_rows(held, at).numpy()
            ended = np.where(stored[rows] & _END, _TERMINATED, 0)
            stored[rows] = np.where(now, _TRUNCATED, ended) | stored[rows] & ~_END

    def contains(self, index: Rows) -> Tensor:
        """bool [n]: which of these transitions are still held."""
        return torch.from_numpy(self._core.rows(ids(index).numpy())) >= 0

    def windows(self, index: Rows, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(reward float32 [B, n], alive bool [B, n]): the n steps from each transition on, and which of them
        belong to its episode and were added already. Rewards of those that do not are zero."""
        at = ids(index).numpy()
        stream, t = at % self.num_envs, at // self.num_envs
        reward = np.zeros((len(at), n), np.float32)
        alive = np.zeros((len(at), n), bool)
        still = np.ones(len(at), bool)
        with self._core.reading() as held:
            _held_rows(held, at)
            count = self._storage.tensors["count"].numpy()[stream]
            for k in range(n):
                still = still & (t + k < count)
                rows = stream * self._storage.rows_per_stream + (t + k) % self._storage.limits[stream]
                alive[:, k] = still
                reward[:, k] = np.where(still, self._storage.tensors["reward"].numpy()[rows], 0)
                still = still & (self._storage.tensors["flags"].numpy()[rows] == 0)
        return reward, alive

    # ---- saving ----

    def state_dict(self) -> dict[str, Any]:
        """{"config": what the buffer was built with, "tensors": its content, the state of sampling included}.

        The tensors share the buffer's memory: copy them, or serialize them, before adding more.
        """
        if self._gpu:
            self._gpu.begin_read()  # frames may still be on their way
        tensors = self._storage.used()
        tensors["sampling"] = torch.tensor([self.seed, self._batches_drawn], dtype=torch.int64, device=CPU)
        tensors["beta"] = torch.tensor([self.beta], dtype=torch.float64, device=CPU)
        if self._priorities:
            tensors |= {f"priority.{name}": value for name, value in self._priorities.state_dict().items()}
        return {"config": self._config, "tensors": tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes this buffer, which must have been built with the same arguments, continue as the saved
        one."""
        if state["config"] != self._config:
            differing = [name for name in self._config if state["config"].get(name) != self._config[name]]
            raise ValueError(f"the state is of a buffer that was built with other values of {differing}")
        if self._gpu:
            self._gpu.begin_read()  # frames on their way come before those of the state
        tensors = state["tensors"]
        own = self._storage.tensors
        for name in own:
            saved = tensors[name]
            (own[name][:, : saved.shape[1]] if name.startswith("frames.") else own[name]).copy_(saved)
        if self._gpu:
            self._gpu.end_read()  # and those of the next add after them
        self._restore_sampling(tensors)

    def _restore_sampling(self, tensors: Mapping[str, Tensor]) -> None:
        self.seed, self._batches_drawn = tensors["sampling"].tolist()
        self.beta = float(tensors["beta"])
        self._storage.restore_recent()
        if self._priorities:
            saved = {n.removeprefix("priority."): v for n, v in tensors.items() if n.startswith("priority.")}
            self._priorities.load_state_dict(saved)

    def save(self, path: str | os.PathLike) -> None:
        """Writes everything, with checksums. `path` appears, or is replaced, once the file is complete."""
        with self._lock, self._core.reading():
            state = self.state_dict()
            io.write(path, state["config"], state["tensors"])

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        *,
        device: str | torch.device = "cpu",
        storage: Literal["device", "pinned"] = "device",
    ) -> "ReplayBuffer":
        """Opens what `save` wrote; sampling continues as it would have. If the environments start afresh,
        call `cut()` before adding.

        Raises:
            ValueError: not a saved buffer, one of another format version, or a damaged one.
        """
        with open(path, "rb") as file:
            reader = io.Reader(file, os.fspath(path))
            buffer = cls._from_config(reader.config, device, storage)
            tensors = {}
            for name, (dtype, shape) in reader.shapes().items():
                own = buffer._storage.tensors.get(name)
                if own is None:
                    tensors[name] = torch.empty(shape, dtype=dtype, device=CPU)
                else:
                    tensors[name] = own[:, : shape[1]] if name.startswith("frames.") else own
            reader.read_into(tensors)
        buffer._restore_sampling(tensors)
        return buffer

    @classmethod
    def _from_config(
        cls, config: dict[str, Any], device: str | torch.device, storage: Literal["device", "pinned"]
    ) -> "ReplayBuffer":
        def dtype(name: str) -> torch.dtype:
            return getattr(torch, name)

        options = dict(config)
        kinds = {"Uniform": Uniform, "Recent": Recent, "Prioritized": Prioritized}
        sampler = dict(options.pop("sampler"))
        shapes, obs_dtype, stack = (
            options.pop("obs_shape"),
            options.pop("obs_dtype"),
            options.pop("frame_stack"),
        )
        names = {key: dtype(name) for key, name in obs_dtype.items()}
        single, channels_last = options.pop("single"), options.pop("channels_last")
        return cls(
            options.pop("capacity"),
            obs_shape=shapes["obs"] if single else shapes,
            obs_dtype=names["obs"] if single else names,
            frame_stack=stack["obs"] if single else stack,
            channels_last=channels_last["obs"] if single else channels_last,
            action_dtype=dtype(options.pop("action_dtype")),
            extras={name: (shape, dtype(kind)) for name, (shape, kind) in options.pop("extras").items()},
            sampler=kinds[sampler.pop("kind")](**sampler),
            device=device,
            storage=storage,
            **options,
        )

    @property
    def _config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON values; the device is left to whoever loads."""
        action_shape, action_dtype = self._columns["action"]
        return {
            "capacity": self.capacity,
            "num_envs": self.num_envs,
            "single": self._single,
            "obs_shape": {key.name: list(key.shape) for key in self._keys},
            "obs_dtype": {key.name: _name(key.dtype) for key in self._keys},
            "frame_stack": {key.name: key.stack for key in self._keys},
            "channels_last": {key.name: key.channels_last for key in self._keys},
            "action_shape": list(action_shape),
            "action_dtype": _name(action_dtype),
            "extras": {name: [list(shape), _name(dtype)] for name, (shape, dtype) in self._extras.items()},
            "on_jump": "cut" if self._core.cut_at_jumps else "error",
            "n_step": self.n_step,
            "gamma": self.gamma,
            "sampler": {"kind": type(self.sampler).__name__, **asdict(self.sampler)},
        }

    def __getstate__(self) -> dict[str, Any]:
        with self._lock, self._core.reading():
            state = self.state_dict()
            tensors = {name: tensor.clone() for name, tensor in state["tensors"].items()}
            if self._gpu:
                self._gpu.end_read()  # the copies are made on the device, maybe later
        return {**state, "tensors": tensors, "device": str(self.device), "storage": self._placement}

    def __reduce__(self) -> tuple:
        # Arrays are pickled by value. Tensors would be handed to a spawned process as memory of this one,
        # which is gone once these copies are.
        state = self.__getstate__()
        arrays = {name: tensor.cpu().numpy() for name, tensor in state["tensors"].items()}
        return copyreg.__newobj__, (type(self),), {**state, "tensors": arrays, "drawn_in": self._drawn_in}  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = {
            name: torch.from_numpy(values) if isinstance(values, np.ndarray) else values
            for name, values in state["tensors"].items()
        }
        self.__dict__.update(self._from_config(state["config"], state["device"], state["storage"]).__dict__)
        self.load_state_dict({**state, "tensors": tensors})
        self._drawn_in = state.get("drawn_in", self._drawn_in)

    # ---- streams ----

    def stream_bounds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(first, ended, count), each int64 [num_envs]: a stream holds its transitions first .. count - 1,
        and those before `ended` belong to episodes that have ended. Transition t of environment e has the id
        t * num_envs + e."""
        return self._storage.bounds()

    def stream_rows(self, env: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Transitions start .. stop - 1 of an environment, which must be held: reward float32, end bool (the
        episode ended, or was cut, with this step), terminated bool and time int32 (steps since the episode
        began)."""
        rows = env * self._storage.rows_per_stream + np.arange(start, stop) % self._storage.limits[env]
        return {
            "reward": self._storage.tensors["reward"].numpy()[rows],
            "end": self._storage.tensors["flags"].numpy()[rows] != 0,
            "terminated": (self._storage.tensors["flags"].numpy()[rows] & _TERMINATED) != 0,
            "time": self._storage.tensors["time"].numpy()[rows],
        }


def _held_rows(held: Any, index: Rows) -> Tensor:
    """The rows of these ids while the lock is `held`, as `reading()` and `writing()` of the core do."""
    at = ids(index)
    rows = torch.from_numpy(held.rows(at.numpy()))
    if (rows < 0).any():
        gone = at[rows < 0]
        raise IndexError(
            f"{len(gone)} of {len(at)} transitions, first {int(gone[0])}, are not in the buffer: they "
            "were overwritten or never added (contains() tells which are held)"
        )
    return rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
