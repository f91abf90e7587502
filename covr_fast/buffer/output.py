"""What a batch is written into: its tensors, and the request by which C++ fills them."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .. import _C
from .batch import Batch, Observation
from .observation import KeySpec, Shape
from .options import Options

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
        _check(keys, augment, pad, dtype, memory_format)
        self.offset_range = 0 if augment is None else 2 * pad + 1
        self.shift_origin = pad if augment == "shift" else 0
        crop = pad if augment == "crop" else 0
        self.targets: list[_C.GatherTarget] = []
        self._outputs: list[tuple[Shape, torch.dtype, bool, int]] = []
        for key in keys:
            channels_last = memory_format == torch.channels_last and len(key.shape) == 3
            kind, lost = (dtype, crop) if key.is_image else (key.dtype, 0)
            shifted = augment is not None and key.is_image
            size = key.height - 2 * lost, key.width - 2 * lost
            self.targets.append(_C.GatherTarget(channels_last, shifted, *size))
            shape = key.out_shape(lost)
            self._outputs.append((shape, kind, channels_last, math.prod(shape) * kind.itemsize))

    def allocate(self, n: int, pool: Any) -> list[Tensor]:
        """Host memory for n observations of every key. Large ones are of the pool, and return to it when no
        tensor shares them any more."""
        out = []
        for shape, dtype, channels_last, row_bytes in self._outputs:
            if channels_last:
                c, h, w = shape
                shape = (h, w, c)
            if n * row_bytes < _POOLED:
                values = torch.empty((n, *shape), dtype=dtype, device=CPU)
            else:
                values = torch.from_numpy(pool.take(n * row_bytes)).view(dtype).view(n, *shape)
            out.append(values.permute(0, 3, 1, 2) if channels_last else values)
        return out

    def allocate_on(self, device: torch.device, n: int) -> list[Tensor]:
        return [
            torch.empty(
                (n, *shape),
                dtype=dtype,
                device=device,
                memory_format=torch.channels_last if channels_last else torch.contiguous_format,
            )
            for shape, dtype, channels_last, _ in self._outputs
        ]

    def contiguous(self, out: list[Tensor]) -> list[Tensor]:
        """What `allocate` or `allocate_on` has made, with its dimensions in the order of memory."""
        return [
            values.permute(0, 2, 3, 1) if channels_last else values
            for values, (_, _, channels_last, _) in zip(out, self._outputs, strict=True)
        ]


class Gather(Protocol):
    """How batches are made where the buffer is: `host.HostGather` or `gpu.DeviceGather`."""

    lock: AbstractContextManager[Any]
    """Excludes `adding` and `fill` of other threads. Acquire it before the lock of the C++ core."""
    pin_memory: bool
    """Whether what the CPU fills of a batch is pinned memory."""

    def adding(self) -> AbstractContextManager[None]:
        """For the block in which the core adds. It locks."""

    def start_reading(self) -> None:
        """From here on the caller may read frames."""

    def reading(self) -> AbstractContextManager[None]:
        """For a block that reads frames, which must not be replaced before they are read."""

    def allocate(self, spec: OutputSpec, n: int) -> list[Tensor]:
        """Memory for n observations, one tensor per key, where `fill` writes them."""

    def fill(
        self,
        request: _C.ObservationsOut,
        draw: Draw,
        spec: OutputSpec,
        obs: list[Tensor],
        next_obs: list[Tensor],
    ) -> None:
        """Fills what `request` names, and obs and next_obs, which are of `allocate`. next_obs may be []. It
        locks."""

    def frames(self, ring: Tensor, streams: Tensor, slots: Tensor) -> Tensor:
        """The single frames ring[streams, slots], where batches arrive. Call it while `reading`."""

    def deliver(self, batch: Batch) -> None:
        """Sends what the CPU filled of a batch to where batches arrive."""


class BatchWriter:
    """Allocates batches and has them filled."""

    def __init__(self, options: Options, gather: Gather) -> None:
        self._keys = options.keys
        self._single = options.single
        self._gather = gather
        self._specs: dict[tuple[Any, ...], OutputSpec] = {}
        pinned = {"pin_memory": True} if gather.pin_memory else {}

        def maker(dtype: torch.dtype) -> Callable[..., Tensor]:
            """Makes tensors [*sizes]. Dtype and device are settled here, which saves time in every batch."""
            return partial(torch.empty(0, dtype=dtype, device="cpu").new_empty, **pinned)

        self._floats, self._bools = maker(torch.float32), maker(torch.bool)
        self._columns = [(c.name, maker(c.dtype), c.shape) for c in options.columns]

    def spec(
        self, augment: Augment | None, pad: int, dtype: torch.dtype, memory_format: torch.memory_format
    ) -> OutputSpec:
        options = (augment, pad, dtype, memory_format)
        spec = self._specs.get(options)
        if spec is None:
            spec = self._specs[options] = OutputSpec(self._keys, *options)
        return spec

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
        obs, next_obs = self._gather.allocate(spec, n), self._gather.allocate(spec, n)
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
        out = self._gather.allocate(spec, len(index))
        self._gather.fill(_C.ObservationsOut(index), draw, spec, out, [])
        return self.join(out)

    def join(self, observations: list[Tensor]) -> Observation:
        """A tensor, or a dict of them, of one tensor per key."""
        if self._single:
            return observations[0]
        return {key.name: values for key, values in zip(self._keys, observations, strict=True)}


def _check(
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
    if augment is None:
        return
    if augment not in ("shift", "crop"):
        raise ValueError(f"augment is {augment!r}: it must be None, 'shift' or 'crop'")
    images = [key for key in keys if key.is_image]
    if not images:
        raise ValueError(f"augment={augment!r} needs an image observation (uint8, [C, H, W] or [H, W])")
    if pad < 0 or pad > 1024:
        raise ValueError(f"pad is {pad}: it must lie in [0, 1024]")
    if augment == "crop" and any(2 * pad >= min(key.height, key.width) for key in images):
        raise ValueError(f"pad is {pad}: a crop by {2 * pad} pixels leaves nothing of the images")
