"""The replay buffer."""

import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .. import _C
from . import io
from .batch import Batch, Observation
from .device import DeviceGather, check_device
from .samplers import Prioritized, PriorityTree, Recent, Sampler, Uniform, as_sampler
from .spec import KeySpec, ShapeAndType, key_specs, shape_and_dtype
from .storage import Storage

Rows = np.ndarray | Tensor | Sequence
ObservationRows = Rows | Mapping[str, Rows]
Augment = Literal["shift", "crop"]

_GOLDEN, _MASK = 0x9E3779B97F4A7C15, (1 << 63) - 1  # spread consecutive batch numbers over the seeds
_TERMINATED = 1  # the flag of csrc/replay.h
_OUT_TYPES = {torch.uint8: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


class ReplayBuffer:
    """A ring of single frames per environment, from which stacks and next observations are rebuilt.

    An observation [C * stack, H, W] arrives stacked, as environments give it, and its one new frame is
    stored: about C * H * W bytes per transition instead of 2 * stack times that. What comes out of `sample`
    equals what went into `add`, byte for byte, at episode starts (whatever the first stack is padded with),
    terminations, truncations, and across the ring's seam.

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
        seed: of all sampling. None draws one.
        extras: further values per transition, name -> shape, or name -> (shape, dtype); float32 unless given.
        obs_dtype: uint8 for images and float32 for the rest unless given.
        action_dtype: dtype that actions are stored in.
        channels_last: images arrive as [H, W, C * stack] (a dict says it per key). They are sampled channels
            first all the same.
        on_jump: what to do where `obs` is not `next_obs` of the step before, in the middle of an episode:
            refuse it, or take it for the start of a new segment, as after `cut`. (With frame_stack=1 it
            always is one.)
        storage: "pinned", with device="cuda", keeps frames that are too many for the GPU in pinned host
            memory; the kernel that makes a batch reads them over the bus.

    Adding and sampling may happen in different threads; each call is atomic.
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
        self.seed = secrets.randbits(63) if seed is None else int(seed)
        self._batches_drawn = 0
        self._keys = key_specs(obs_shape, obs_dtype, frame_stack, channels_last)
        self._single = not isinstance(obs_shape, Mapping)
        self._extras = {name: shape_and_dtype(spec) for name, spec in (extras or {}).items()}
        self._columns = {"action": (tuple(action_shape), action_dtype), **self._extras}
        self._numpy_types = {name: _numpy_dtype(dtype) for name, (_, dtype) in self._columns.items()}
        self._pool = _C.OutputPool()
        pinned = storage == "pinned"
        self._storage = Storage(
            capacity, num_envs, self._keys, self._columns, n_step, gamma, self.device, pinned
        )
        self._core = self._storage.core
        self._core.jumps = on_jump == "cut"
        self._gpu: DeviceGather | None = None
        if self.device.type == "cuda":
            self._gpu = DeviceGather(self.device, self._storage, self._keys, pinned)
        self._priorities: PriorityTree | None = None
        if isinstance(self.sampler, Prioritized):
            self._priorities = PriorityTree(self._storage.rows, self._storage.limits, self.sampler.alpha)
        # The C++ core locks by itself; what belongs together with it on this side needs one more.
        alone = self._gpu is None and self._priorities is None
        self._lock: AbstractContextManager = nullcontext() if alone else threading.RLock()

    def __len__(self) -> int:
        """Transitions held."""
        return self._core.size()

    @property
    def nbytes(self) -> int:
        """Bytes allocated for storage, frames and bookkeeping together."""
        return self._storage.nbytes

    def __repr__(self) -> str:
        shapes = ", ".join(f"{key.name} {key.shape} {str(key.dtype)[6:]} x{key.stack}" for key in self._keys)
        return (
            f"ReplayBuffer({len(self)}/{self.capacity} transitions of {self.num_envs} environments; "
            f"{shapes}; {type(self.sampler).__name__.lower()}, n_step={self.n_step}; "
            f"{self.nbytes / 2**20:.1f} MiB, {self._where})"
        )

    @property
    def _where(self) -> str:
        return (
            f"on {self.device}"
            if self._placement == "device"
            else f"frames pinned on the host for {self.device}"
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

        Returns:
            int64 [E], the ids of the new transitions.

        Raises:
            ValueError: rows of the wrong shape or dtype; a reward, action or observation that is NaN or
                infinite; or an observation that contradicts its stream, in
                which case nothing was added. Stacks are compared in full where frames are small (at most 4
                KiB) and at episode starts and ends, and by one stretch of 256 bytes in eight in between,
                other ones each step.
        """
        if extras.keys() != self._extras.keys():
            raise ValueError(f"add() got the extras {sorted(extras)}, declared are {sorted(self._extras)}")
        rows = (
            self._observation_rows(obs, "obs"),
            self._observation_rows(next_obs, "next_obs"),
            _finite(_rows(reward, np.float32), "reward"),
            _flags(terminated, "terminated"),
            _flags(truncated, "truncated"),
            [
                _finite(_rows(action, self._numpy_types["action"]), "action"),
                *(_rows(extras[name], self._numpy_types[name]) for name in self._extras),
            ],
            None if env_ids is None else _rows(env_ids, np.int64),
            self.num_envs,
        )
        with self._lock:
            if self._gpu:
                self._gpu.before_add()
            ids = self._core.add(*rows)
            if self._gpu:
                self._gpu.after_add()
            if self._priorities:
                self._priorities.follow(*self._storage.ready())
        return torch.from_numpy(ids)

    def _observation_rows(self, observation: ObservationRows, what: str) -> list[np.ndarray]:
        if self._single:
            return [_checked_rows(observation, self._keys[0], what)]  # type: ignore[arg-type]
        if not isinstance(observation, Mapping):
            raise ValueError(f"{what} must be a dict with the keys {[key.name for key in self._keys]}")
        missing = [key.name for key in self._keys if key.name not in observation]
        if missing:
            raise ValueError(f"{what} lacks the keys {missing}")
        return [_checked_rows(observation[key.name], key, f"{what}[{key.name!r}]") for key in self._keys]

    def cut(self, env_ids: Rows | None = None) -> None:
        """Declares that these environments (None: all) were reset outside, e.g. when a run is resumed.

        Their next row begins a new segment. The last one ends as a truncated episode would: n-step returns
        stop there and bootstrap.
        """
        with self._lock:
            self._core.cut(None if env_ids is None else _rows(env_ids, np.int64), self.num_envs)
            if self._priorities:
                self._priorities.follow(*self._storage.ready())

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
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
        batch = self._batches_drawn
        self._batches_drawn += 1
        if self._priorities is None:
            index = torch.empty(batch_size, dtype=torch.int64)
            eta, floor = 1.0, 1
            if isinstance(self.sampler, Recent):
                eta, floor = self.sampler.eta**1000, self.sampler.floor
            return self._gather(index, batch, (eta, floor), self.n_step, augment, pad, dtype, memory_format)
        with self._lock:
            if not self._core.samplable():
                raise IndexError("nothing to sample: no transition with all its n steps is stored yet")
            rows, probability = self._priorities.draw(batch_size, (self.seed ^ batch * _GOLDEN) & _MASK)
            index = torch.from_numpy(self._core.ids_in_rows(rows.numpy()))
            result = self._gather(index, batch, None, self.n_step, augment, pad, dtype, memory_format)
            weight = (self._core.samplable() * probability) ** -self.beta
        result.weight = (weight / weight.max()).to(self.device, torch.float32)
        return result

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
        batch = self._batches_drawn
        self._batches_drawn += 1
        n_step = self.n_step if n_step is None else n_step
        if n_step < 1:
            raise ValueError(f"n_step is {n_step}: it must be at least 1")
        return self._gather(_index(index).clone(), batch, None, n_step, augment, pad, dtype, memory_format)

    def update_priorities(self, index: Rows, priority: Rows) -> None:
        """Sets the priorities [n], e.g. absolute TD errors, of these transitions; overwritten ones are
        skipped."""
        if self._priorities is None:
            raise ValueError('update_priorities() needs sampler="prioritized"')
        ids = _index(index).numpy()
        values = _rows(priority, np.float64).reshape(-1)
        if len(values) != len(ids):
            raise ValueError(f"priority has {len(values)} values for {len(ids)} transitions")
        if len(values) and not (values.min() >= 0 and values.max() < np.inf):
            raise ValueError("priority must be finite and not negative: pass absolute TD errors")
        with self._lock:
            self._priorities.set(ids, self._core.rows(ids), values)

    def _gather(
        self,
        index: Tensor,
        batch: int,
        draw: tuple[float, int] | None,
        n_step: int,
        augment: Augment | None,
        pad: int,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
    ) -> Batch:
        """Draws ids into `index` with (recency, floor), or takes those it holds if `draw` is None."""
        n = index.numel()
        shifted, crop = self._augmentation(augment, pad)
        pin = self._gpu is not None

        def column(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(n, *shape, dtype=dtype, pin_memory=pin)

        reward, discount = column(), column()
        terminated, truncated = column(dtype=torch.bool), column(dtype=torch.bool)
        columns = {name: column(*shape, dtype=kind) for name, (shape, kind) in self._columns.items()}
        offsets = torch.empty(2, n, 2, dtype=torch.int64) if shifted else None
        request = _C.BatchOut(
            rows=n,
            n_step=n_step,
            ids=index.data_ptr(),
            reward=reward.data_ptr(),
            discount=discount.data_ptr(),
            terminated=terminated.data_ptr(),
            truncated=truncated.data_ptr(),
            columns=[values.data_ptr() for values in columns.values()],
            offsets=0 if offsets is None else offsets.data_ptr(),
            offset_range=2 * pad + 1,
            shift_origin=pad if augment == "shift" else 0,
        )
        targets = [self._target(key, dtype, shifted, crop, memory_format) for key in self._keys]
        obs, next_obs = (
            [self._output(key, n, dtype, shifted, crop, memory_format) for key in self._keys]
            for _ in range(2)
        )
        if self._gpu is None:
            for target, one, other in zip(targets, obs, next_obs, strict=True):
                request.add_key(target, one.data_ptr(), other.data_ptr())
        recency, floor = (-1.0, 0) if draw is None else draw
        with self._lock:
            self._core.sample(request, self.seed, batch, recency, floor, torch.get_num_threads())
            if self._gpu:
                self._gpu.gather(request, n, targets, obs, next_obs)
        columns = {name: self._arrive(values) for name, values in columns.items()}
        return Batch(
            obs=self._join(obs),
            action=columns.pop("action"),
            reward=self._arrive(reward),
            next_obs=self._join(next_obs),
            discount=self._arrive(discount),
            terminated=self._arrive(terminated),
            truncated=self._arrive(truncated),
            index=index,
            weight=torch.ones(n, device=self.device),
            extras=columns,
            obs_offset=None if offsets is None else offsets[0],
            next_obs_offset=None if offsets is None else offsets[1],
        )

    def _arrive(self, values: Tensor) -> Tensor:
        return values if self._gpu is None else values.to(self.device, non_blocking=True)

    def _augmentation(self, augment: Augment | None, pad: int) -> tuple[bool, int]:
        """Whether pictures are shifted at all, and how many pixels are cropped from every edge."""
        if augment is None:
            return False, 0
        if augment not in ("shift", "crop"):
            raise ValueError(f"augment is {augment!r}: it must be None, 'shift' or 'crop'")
        images = [key for key in self._keys if key.is_image]
        if not images:
            raise ValueError(f"augment={augment!r} needs an image observation (uint8, three dimensions)")
        if pad < 0 or pad > 1024:
            raise ValueError(f"pad is {pad}: it must lie in [0, 1024]")
        if augment == "crop" and any(2 * pad >= min(key.height, key.width) for key in images):
            raise ValueError(f"pad is {pad}: a crop by {2 * pad} pixels leaves nothing of the images")
        return True, pad if augment == "crop" else 0

    def _target(
        self, key: KeySpec, dtype: torch.dtype, shifted: bool, crop: int, memory_format: torch.memory_format
    ) -> Any:
        if memory_format not in (torch.contiguous_format, torch.channels_last):
            raise ValueError(f"memory_format is {memory_format}: use contiguous_format or channels_last")
        if dtype not in _OUT_TYPES:
            raise ValueError(f"dtype is {dtype}: observations come as uint8, float32, bfloat16 or float16")
        channels_last = memory_format == torch.channels_last and len(key.shape) == 3
        if not key.is_image:
            return _C.GatherTarget(0, channels_last, False, key.height, key.width)
        return _C.GatherTarget(
            _OUT_TYPES[dtype], channels_last, shifted, key.height - 2 * crop, key.width - 2 * crop
        )

    def _output(
        self,
        key: KeySpec,
        n: int,
        dtype: torch.dtype,
        shifted: bool,
        crop: int,
        memory_format: torch.memory_format,
    ) -> Tensor:
        """Memory for n observations of a key: used again when the last tensor that shares it is gone."""
        dtype = dtype if key.is_image else key.dtype
        shape = (n, *key.out_shape(crop if shifted and key.is_image else 0))
        if self._gpu:
            return torch.empty(
                shape, dtype=dtype, device=self.device, memory_format=_format(key, memory_format)
            )
        items = int(np.prod(shape, dtype=np.int64))
        flat = torch.from_numpy(self._pool.take(items * dtype.itemsize)).view(dtype)
        if memory_format == torch.channels_last and len(key.shape) == 3:
            n, c, h, w = shape
            return flat.view(n, h, w, c).permute(0, 3, 1, 2)
        return flat.view(shape)

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
        ids = _index(index)
        plain = torch.contiguous_format
        out = [self._output(key, len(ids), dtype, False, 0, plain) for key in self._keys]
        targets = [self._target(key, dtype, False, 0, plain) for key in self._keys]
        request = _C.BatchOut(len(ids), 1, ids.data_ptr(), 0, 0, 0, 0, [], 0, 0, 0)
        if self._gpu is None:
            for target, values in zip(targets, out, strict=True):
                request.add_key(target, values.data_ptr(), 0)
        with self._lock:
            self._core.observe(request, torch.get_num_threads())
            if self._gpu:
                self._gpu.gather(request, len(ids), targets, out, [])
        return self._join(out)

    def frames(self, index: Rows) -> Observation:
        """The newest single frames, [n, C, H, W] in the stored dtype, of these transitions."""
        out = []
        with self._lock:
            rows = self._held_rows(index)
            if self._gpu:
                self._gpu.begin_read()
            for key in self._keys:
                frames = self._storage.tensors[f"frames.{key.name}"]
                slots = self._storage.tensors[f"newest.{key.name}"][rows] % frames.shape[1]
                out.append(frames[rows // self._storage.rows_per_stream, slots].to(self.device))
            if self._gpu:
                self._gpu.end_read()
        return self._join(out)

    def actions(self, index: Rows) -> Tensor:
        """The actions [n, *action_shape] of these transitions."""
        return self._storage.tensors["column.action"][self._held_rows(index)]

    def extras(self, index: Rows) -> dict[str, Tensor]:
        """The extras, each [n, *shape], of these transitions."""
        rows = self._held_rows(index)
        return {name: self._storage.tensors[f"column.{name}"][rows] for name in self._extras}

    def set_extras(self, index: Rows, **values: Rows) -> None:
        """Overwrites extras of these transitions, e.g. with a prior that arrives after its step."""
        if unknown := values.keys() - self._extras.keys():
            raise ValueError(f"set_extras() got {sorted(unknown)}, declared are {sorted(self._extras)}")
        rows = self._held_rows(index)
        for name, value in values.items():
            column = self._storage.tensors[f"column.{name}"]
            new = torch.as_tensor(value, dtype=column.dtype, device=column.device)
            column[rows] = new.reshape(len(rows), *column.shape[1:])

    def contains(self, index: Rows) -> Tensor:
        """bool [n]: which of these transitions are still held."""
        return torch.from_numpy(self._core.rows(_index(index).numpy())) >= 0

    def windows(self, index: Rows, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(reward float32 [B, n], alive bool [B, n]): the n steps from each transition on, and which of them
        belong to its episode and were added already. Rewards of those that do not are zero."""
        first = self._held_rows(index)
        ids = _index(index).numpy()
        stream, t = ids % self.num_envs, ids // self.num_envs
        reward = np.zeros((len(ids), n), np.float32)
        alive = np.zeros((len(ids), n), bool)
        still = np.ones(len(first), bool)
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
        tensors = self._storage.used()
        tensors["sampling"] = torch.tensor([self.seed, self._batches_drawn], dtype=torch.int64)
        tensors["beta"] = torch.tensor([self.beta], dtype=torch.float64)
        if self._priorities:
            tensors |= {f"priority.{name}": value for name, value in self._priorities.state_dict().items()}
        return {"config": self._config, "tensors": tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes this buffer, which must have been built with the same arguments, continue as the saved
        one."""
        if state["config"] != self._config:
            differing = [name for name in self._config if state["config"].get(name) != self._config[name]]
            raise ValueError(f"the state is of a buffer that was built with other values of {differing}")
        tensors = state["tensors"]
        own = self._storage.tensors
        for name in own:
            saved = tensors[name]
            (own[name][:, : saved.shape[1]] if name.startswith("frames.") else own[name]).copy_(saved)
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
        with self._core.reading():
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
                    tensors[name] = torch.empty(shape, dtype=dtype)
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
            "on_jump": "cut" if self._core.jumps else "error",
            "n_step": self.n_step,
            "gamma": self.gamma,
            "sampler": {"kind": type(self.sampler).__name__, **asdict(self.sampler)},
        }

    def __getstate__(self) -> dict[str, Any]:
        state = self.state_dict()
        return {
            **state,
            "tensors": {name: tensor.clone() for name, tensor in state["tensors"].items()},
            "device": str(self.device),
            "storage": self._placement,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(self._from_config(state["config"], state["device"], state["storage"]).__dict__)
        self.load_state_dict(state)

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

    def _held_rows(self, index: Rows) -> Tensor:
        ids = _index(index)
        rows = torch.from_numpy(self._core.rows(ids.numpy()))
        if (rows < 0).any():
            gone = ids[rows < 0]
            raise IndexError(
                f"{len(gone)} of {len(ids)} transitions, first {int(gone[0])}, are not in the buffer: they "
                "were overwritten or never added (contains() tells which are held)"
            )
        return rows


def _rows(value: Rows, dtype: Any) -> np.ndarray:
    """As a contiguous numpy array of that dtype, without a copy where it already is one."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    return np.ascontiguousarray(value, dtype)


def _flags(value: Rows, what: str) -> np.ndarray:
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.dtype != np.bool_:
        raise ValueError(f"{what} has dtype {array.dtype}: it must be bool")
    return np.ascontiguousarray(array).view(np.uint8)


def _checked_rows(value: Rows, key: KeySpec, what: str) -> np.ndarray:
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.shape[1:] != key.shape:
        raise ValueError(
            f"{what} has shape {array.shape}: it must be [rows, {', '.join(map(str, key.shape))}]"
        )
    expected = _numpy_dtype(key.dtype)
    if array.dtype != expected:
        if key.dtype == torch.uint8 or array.dtype.kind not in "fiub":
            raise ValueError(f"{what} has dtype {array.dtype}: it must be {expected} (see obs_dtype)")
        array = array.astype(expected)
    _finite(array, what)
    return array if array[:1].flags.c_contiguous else np.ascontiguousarray(array)


def _finite(array: np.ndarray, what: str) -> np.ndarray:
    """The array, if all of it is finite: one NaN in the buffer would end in every network."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        rows = np.unique(np.argwhere(~np.isfinite(array))[:, 0])[:5].tolist()
        raise ValueError(f"{what} is NaN or infinite in rows {rows}: nothing was added; mend the environment")
    return array


def _index(index: Rows) -> Tensor:
    return torch.as_tensor(index, dtype=torch.int64, device="cpu").reshape(-1).contiguous()


def _format(key: KeySpec, memory_format: torch.memory_format) -> torch.memory_format:
    return memory_format if len(key.shape) == 3 else torch.contiguous_format


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    return torch.empty(0, dtype=dtype).numpy().dtype
