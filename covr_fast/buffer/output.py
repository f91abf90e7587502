"""What sampled observations look like: decided once per combination of `sample`'s options."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import _C
from ..border import CPU, address
from .observation import KeySpec, Shape

Augment = Literal["shift", "crop"]

_OUT_TYPES = {torch.uint8: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_POOLED = 1 << 17  # bytes; from about here on malloc asks for fresh pages, which cost more than used ones


class Form:
    """The shapes, dtypes and kernel targets of the observations in a batch, key by key.

    Attributes:
        offset_range: augmentation offsets are drawn from [0, offset_range); 0 without augmentation.
        shift_origin: the offset that leaves a picture where it is.
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
        self.targets: list[Any] = []
        self._outputs: list[tuple[Shape, torch.dtype, bool, int]] = []
        for key in keys:
            channels_last = memory_format == torch.channels_last and len(key.shape) == 3
            kind, lost = (dtype, crop) if key.is_image else (key.dtype, 0)
            out_type = _OUT_TYPES[dtype] if key.is_image else 0
            shifted = augment is not None and key.is_image
            size = key.height - 2 * lost, key.width - 2 * lost
            self.targets.append(_C.GatherTarget(out_type, channels_last, shifted, *size))
            shape = key.out_shape(lost)
            self._outputs.append((shape, kind, channels_last, math.prod(shape) * kind.itemsize))

    def allocate(self, n: int, pool: Any) -> list[Tensor]:
        """Host memory for n observations of every key; large ones from the pool, where they return to when
        the last tensor that shares them is gone."""
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

    def addresses(self, out: list[Tensor], device: torch.device | None = None) -> list[int]:
        """Where the kernels write what `allocate`, or with a device `allocate_on`, has made."""
        return [
            address(values.permute(0, 2, 3, 1) if channels_last else values, dtype, device)
            for values, (_, dtype, channels_last, _) in zip(out, self._outputs, strict=True)
        ]


def _check(
    keys: Sequence[KeySpec],
    augment: Augment | None,
    pad: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(f"memory_format is {memory_format}: use contiguous_format or channels_last")
    if dtype not in _OUT_TYPES:
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
