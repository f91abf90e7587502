"""Pillow's resampling in torch: the same bytes, for a batch of frames on their device.

A pass along one side is a product with a matrix that is zero outside a band around its diagonal. Pillow's
weights are integers / 2^22, and each pass ends in bytes. Their products with bytes are exact in float64, in
any order of summation and whatever is set about TF32; so the result is Pillow's, bit for bit.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LANCZOS, BICUBIC = 1, 3
"""Pillow's numbers of its filters."""
_ONE = 1 << 22
"""The weight 1 in Pillow's fixed point for bytes."""
_BLOCK = {"cpu": 64, "cuda": 128}
"""By device, the outputs of one block of a band, or its inputs if they are more. Small blocks leave out more
of the band's zeros; large ones need fewer launches."""
_AT_A_TIME = {"cpu": 1, "cuda": 64}
"""By device, the frames that are resized together. Through 2048x2048 (SmolVLM2) one uses 4 MB, which a core's
cache holds, and 64 use 0.5 GB."""


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)


def _bicubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, -0.5 * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0))


FILTERS: dict[int, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    LANCZOS: (_lanczos, 3.0),
    BICUBIC: (_bicubic, 2.0),
}
"""Per filter its function, and from where on that is zero."""


class Block(NamedTuple):
    """Some neighbouring outputs of a pass, which depend on the inputs from `begin` to `end`."""

    begin: int
    end: int
    weights: Tensor
    """float64[outputs, end - begin]."""


Band = list[Block]
"""A pass along one side: the blocks of all outputs, in order."""


def resize(images: Tensor, sizes: Sequence[tuple[int, int]], filter_: int) -> Tensor:
    """uint8[B, C, H, W] resized to each of `sizes` in turn (height, width) -> uint8[B, C, *sizes[-1]].

    Each size is one `Image.resize` of Pillow with one of `FILTERS`, in the version that is installed.
    """
    old = (images.shape[2], images.shape[3])
    passes: list[tuple[int, Band]] = []  # (0, ...) along the height, (1, ...) along the width
    for new in sizes:
        for side in (0, 1) if height_first(old, new) else (1, 0):
            if old[side] != new[side]:
                passes.append((side, band(old[side], new[side], filter_, images.device)))
        old = new
    if not passes:
        return images
    return torch.cat([_through(passes, part) for part in images.split(_AT_A_TIME[_kind(images.device)])])


def _through(passes: list[tuple[int, Band]], images: Tensor) -> Tensor:
    """Some of the frames, through all passes."""
    passes = list(passes)
    x = images.permute(2, 0, 1, 3).flatten(1, 2)  # [H, B * C, W]: every pass is a product of two matrices
    while passes:
        side, blocks = passes.pop(0)
        if side == 1:
            x = _across(x.flatten(0, 1).double(), blocks).unflatten(0, x.shape[:2])
        else:
            # Row by row, so that an image between two sizes, which may be large, never exists as a whole.
            x = _down(x, blocks, passes.pop(0)[1] if passes and passes[0][0] == 1 else None)
    resized: Tensor = x.unflatten(1, images.shape[:2]).permute(1, 2, 0, 3)
    return resized.contiguous()


def _down(x: Tensor, blocks: Band, then: Band | None) -> Tensor:
    """A pass along the height, uint8[H, N, W], followed by one along the width if there is `then`."""
    _, count, width = x.shape
    x, parts = x.flatten(1), []
    for begin, end, weights in blocks:
        rows = _rounded(weights @ x[begin:end].double()).view(-1, width)
        rows = rows.byte() if then is None else _across(rows.floor_(), then)
        parts.append(rows.view(len(weights), count, -1))
    return torch.cat(parts)


def _across(x: Tensor, blocks: Band) -> Tensor:
    """A pass along the width: bytes as float64[M, W] -> uint8[M, outputs]."""
    out = x.new_empty(len(x), sum(len(block.weights) for block in blocks))
    at = 0
    for begin, end, weights in blocks:
        torch.mm(x[:, begin:end], weights.t(), out=out[:, at : at + len(weights)])
        at += len(weights)
    return _rounded(out).byte()


def _rounded(x: Tensor) -> Tensor:
    """Numbers whose whole part is the byte that is nearest to `x`, in place; halves go up, as in Pillow."""
    return x.add_(0.5).clamp_(0, 255)


def height_first(old: tuple[int, int], new: tuple[int, int]) -> bool:
    """Whether Pillow resizes the height before the width. Since version 13 it does so to save work."""
    from PIL import __version__

    lost = old[0] - new[0]
    return int(__version__.partition(".")[0]) >= 13 and lost > 0 and lost > 2 * (old[1] - new[1])


@lru_cache(maxsize=64)
def band(inputs: int, outputs: int, filter_: int, device: torch.device) -> Band:
    """Pillow's weights for a pass from `inputs` to `outputs` bytes. They are copied to the device once."""
    kernel, support = FILTERS[filter_]
    scale = inputs / outputs
    stretch = max(scale, 1.0)  # to make an image smaller, the filter is stretched over more inputs
    centre = (np.arange(outputs) + 0.5) * scale
    # Pillow cuts toward zero. Below zero, where that differs from rounding down, it begins at 0 anyway.
    begin = (centre - support * stretch + 0.5).astype(np.int64).clip(min=0)
    end = (centre + support * stretch + 0.5).astype(np.int64).clip(max=inputs)
    place = np.arange(inputs)
    dense = kernel((place - centre[:, None] + 0.5) / stretch)
    dense *= (begin[:, None] <= place) & (place < end[:, None])
    dense /= dense.sum(1, keepdims=True)
    weights = torch.from_numpy(np.trunc(dense * _ONE + np.copysign(0.5, dense)) / _ONE)
    size = max(1, round(_BLOCK[_kind(device)] / stretch))
    blocks = []
    for i in range(0, outputs, size):
        low, high = int(begin[i]), int(end[i : i + size].max())
        blocks.append(Block(low, high, weights[i : i + size, low:high].to(device)))
    return blocks


def _kind(device: torch.device) -> str:
    """On the meta device memory is counted as on a GPU."""
    return "cuda" if device.type == "meta" else device.type
