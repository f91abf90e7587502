"""What a batch is written into: its tensors, and the request by which C++ fills them."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from .. import _C
from .batch import Batch, Observation
from .options import KeySpec, Options, Shape

Augment = Literal["shift", "crop"]
Draw = Callable[[Any, int], None]
"""draw(request, threads): puts ids into a request (of `_C`), or finds them there, and fills it."""

CPU = torch.device("cpu")  # takes 0.2 us less in every call than "cpu"
_IMAGE_DTYPES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)
_POOLED = 1 << 17  # bytes; from about here on malloc asks for fresh pages, which cost more than used ones


class OutputSpec:
    """The shapes, dtypes and kernel targets of the observations in a batch, for one set of options.

    Attributes:
        offset_range: augmentation offsets are drawn from [0, offset_range); 0 without augmentation.
        shift_origin: the offset that leaves an image where it is.
        targets: what the kernels write, one per key.

    Raises:
        ValueError: options that do not exist, or that these observations do not allow.
    """

    def __init__(
        self,
        keys: Sequence[KeySpec],
        augment: Augment | None,
        pad: int,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
    ) -> None:
        if memory_format not in (torch.contiguous_format, torch.channels_last):
            raise ValueError(f"memory_format is {memory_format}: use contiguous_format or channels_last")
        if dtype not in _IMAGE_DTYPES:
            raise ValueError(f"dtype is {dtype}: observations come as uint8, float32, bfloat16 or float16")
        if augment is not None:
            _check_augment(keys, augment, pad)
        self.offset_range = 0 if augment is None else 2 * pad + 1
        self.shift_origin = pad if augment == "shift" else 0
        crop = pad if augment == "crop" else 0
        self.targets: list[_C.GatherTarget] = []
        self._outputs: list[tuple[Shape, torch.dtype, bool]] = []
        for key in keys:
            channels_last = memory_format == torch.channels_last and len(key.shape) == 3
            kind, lost = (dtype, crop) if key.is_image else (key.dtype, 0)
            shifted = augment is not None and key.is_image
            size = key.height - 2 * lost, key.width - 2 * lost
            self.targets.append(_C.GatherTarget(channels_last, shifted, *size))
            self._outputs.append((key.out_shape(lost), kind, channels_last))

    def allocate(self, n: int, empty: Callable[[Shape, torch.dtype], Tensor]) -> list[Tensor]:
        """n observations of every key, in memory that `empty` makes."""
        out = []
        for shape, dtype, channels_last in self._outputs:
            if channels_last:
                c, h, w = shape
                out.append(empty((n, h, w, c), dtype).permute(0, 3, 1, 2))
            else:
                out.append(empty((n, *shape), dtype))
        return out

    def contiguous(self, out: list[Tensor]) -> list[Tensor]:
        """What `allocate` has made, with its dimensions in the order of memory."""
        return [
            values.permute(0, 2, 3, 1) if channels_last else values
            for values, (_, _, channels_last) in zip(out, self._outputs, strict=True)
        ]


class Gather:
    """Fills batches, here on the CPU, where nothing waits: the lock of the C++ core is enough. For a GPU,
    `gpu.DeviceGather` overrides these methods."""

    lock: AbstractContextManager[Any] = nullcontext()
    """On a GPU: excludes `adding` and `fill` of other threads. Acquire it before the lock of the core."""
    pin_memory = False
    """Whether what the CPU fills of a batch is pinned memory."""

    def __init__(self) -> None:
        self._pool = _C.OutputPool()

    def adding(self) -> AbstractContextManager[None]:
        """For the block in which the core adds. It locks."""
        return self.lock

    def start_reading(self) -> None:
        """From here on the caller may read frames."""

    def reading(self) -> AbstractContextManager[None]:
        """For a block that reads frames, which must not be replaced before they are read."""
        return self.lock

    def empty(self, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Memory for observations, where `fill` can write. What is large returns to a pool when no tensor
        shares it any more."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < _POOLED:
            return torch.empty(shape, dtype=dtype, device=CPU)
        return torch.from_numpy(self._pool.take(nbytes)).view(dtype).view(shape)

    def fill(
        self,
        request: _C.ObservationsOut,
        draw: Draw,
        spec: OutputSpec,
        obs: list[Tensor],
        next_obs: list[Tensor],
    ) -> None:
        """Fills what `request` names, and obs and next_obs; next_obs may be []. It locks."""
        to_next = spec.contiguous(next_obs) if next_obs else [None] * len(obs)
        for key in zip(spec.targets, spec.contiguous(obs), to_next, strict=True):
            request.add_key(*key)
        draw(request, torch.get_num_threads())

    def frames(self, ring: Tensor, streams: Tensor, slots: Tensor) -> Tensor:
        """The single frames ring[streams, slots], where batches arrive. Call it while `reading`."""
        return ring[streams, slots]

    def deliver(self, batch: Batch) -> None:
        """Sends what the CPU filled of a batch to where batches arrive."""


class BatchWriter:
    """Allocates batches and has them filled."""

    def __init__(self, options: Options, gather: Gather) -> None:
        self._keys = options.keys
        self._single = options.single
        self._gather = gather
        self.spec = cache(partial(OutputSpec, options.keys))  # (augment, pad, dtype, memory_format)

        def maker(dtype: torch.dtype) -> Callable[..., Tensor]:
            """Makes tensors [*sizes]. Dtype and device are settled here, which saves time in every batch."""
            new_empty = torch.empty(0, dtype=dtype, device="cpu").new_empty
            return partial(new_empty, pin_memory=True) if gather.pin_memory else new_empty

        self._floats, self._bools = maker(torch.float32), maker(torch.bool)
        self._columns = [(c.name, maker(c.dtype), c.shape) for c in options.columns]

    def batch(self, index: Tensor, draw: Draw, n_step: int, spec: OutputSpec) -> Batch:
        """The batch of the ids that `draw` puts into `index`, or finds there."""
        n = len(index)
        floats, bools = self._floats, self._bools
        reward, discount, weight = floats(n), floats(n), floats(n)
        terminated, truncated = bools(n), bools(n)
        columns = {name: make(n, *shape) for name, make, shape in self._columns}
        offsets = index.new_empty(2, n, 2) if spec.offset_range else None
        request = _C.BatchOut(  # keywords would take 1 us
            index,
            n_step,
            reward,
            discount,
            terminated,
            truncated,
            weight,
            list(columns.values()),
            offsets,
            spec.offset_range,
            spec.shift_origin,
        )
        obs, next_obs = spec.allocate(n, self._gather.empty), spec.allocate(n, self._gather.empty)
        self._gather.fill(request, draw, spec, obs, next_obs)
        batch = Batch(
            obs=self.join(obs),
            action=columns.pop("action"),
            reward=reward,
            next_obs=self.join(next_obs),
            discount=discount,
            terminated=terminated,
            truncated=truncated,
            index=index,
            weight=weight,
            extras=columns,
            obs_offset=None if offsets is None else offsets[0],
            next_obs_offset=None if offsets is None else offsets[1],
        )
        self._gather.deliver(batch)
        return batch

    def observations(self, index: Tensor, draw: Draw, spec: OutputSpec) -> Observation:
        """Only the observations of these ids."""
        out = spec.allocate(len(index), self._gather.empty)
        self._gather.fill(_C.ObservationsOut(index), draw, spec, out, [])
        return self.join(out)

    def join(self, observations: list[Tensor]) -> Observation:
        """A tensor, or a dict of them, of one tensor per key."""
        if self._single:
            return observations[0]
        return {key.name: values for key, values in zip(self._keys, observations, strict=True)}


def _check_augment(keys: Sequence[KeySpec], augment: str, pad: int) -> None:
    if augment not in ("shift", "crop"):
        raise ValueError(f"augment is {augment!r}: it must be None, 'shift' or 'crop'")
    images = [key for key in keys if key.is_image]
    if not images:
        raise ValueError(f"augment={augment!r} needs an image observation (uint8, [C, H, W] or [H, W])")
    if pad < 0 or pad > 1024:
        raise ValueError(f"pad is {pad}: it must lie in [0, 1024]")
    if augment == "crop" and any(2 * pad >= min(key.height, key.width) for key in images):
        raise ValueError(f"pad is {pad}: a crop by {2 * pad} pixels leaves nothing of the images")
