"""Integer shifts and crops of image batches: the augmentation of pixel-based agents."""

import torch
from torch import Tensor

from . import reference
from ._backend import Backend, check_same_device, fake, launch, operator, select
from ._memory import empty

_OUTPUTS = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


def random_shift(
    frames: Tensor,
    offsets: Tensor,
    pad: int = 4,
    *,
    dtype: torch.dtype = torch.float32,
    backend: Backend = "auto",
) -> Tensor:
    """`F.pad(frames, [pad] * 4, "replicate")[b, :, dy : dy + H, dx : dx + W] / 255`, dy, dx = offsets[b].

    The random shift of DrQ (Yarats et al. 2021) for integer offsets, which is what its v2's grid_sample
    computes up to interpolation rounding.

    Args:
        frames: uint8 [B, C, H, W].
        offsets: int64 [B, 2], rows then columns, each in [0, 2 * pad]; `pad` is no shift.
        pad: pixels by which the edge is repeated on every side.
        dtype: float32, bfloat16, float16 (all in [0, 1]) or uint8 (the shifted bytes, not divided).
        backend: "auto", "reference", "cpp" or "cuda".

    Returns:
        [B, C, H, W] of `dtype`, contiguous.

    Raises:
        ValueError: shapes or dtypes other than these; on the CPU also an offset out of range, which on a
            CUDA device reads the nearest edge pixel instead.
    """
    _check("random_shift", frames, offsets, dtype)
    if pad < 0:
        raise ValueError(f"random_shift: pad must not be negative, got {pad}")
    height, width = frames.shape[2:]
    return _window("random_shift", frames, offsets, pad, height, width, dtype, backend)


def random_crop(
    frames: Tensor,
    offsets: Tensor,
    size: int,
    *,
    dtype: torch.dtype = torch.float32,
    backend: Backend = "auto",
) -> Tensor:
    """`frames[b, :, dy : dy + size, dx : dx + size] / 255`, `dy, dx = offsets[b]`.

    The random crop of RAD (Laskin et al. 2020). Arguments and errors as in `random_shift`; offsets are in
    [0, H - size] and [0, W - size], and the result is [B, C, size, size].
    """
    _check("random_crop", frames, offsets, dtype)
    height, width = frames.shape[-2:]
    if not 0 < size <= min(height, width):
        raise ValueError(f"random_crop: size must be in [1, {min(height, width)}], not {size}")
    return _window("random_crop", frames, offsets, 0, size, size, dtype, backend)


def _check(name: str, frames: Tensor, offsets: Tensor, dtype: torch.dtype) -> None:
    if frames.ndim != 4 or frames.dtype != torch.uint8:
        raise ValueError(
            f"{name}: frames must be uint8 [B, C, H, W], not {frames.dtype} {list(frames.shape)}"
        )
    if offsets.dtype != torch.int64 or offsets.shape != (frames.shape[0], 2):
        raise ValueError(
            f"{name}: offsets must be int64 [{frames.shape[0]}, 2], not {offsets.dtype} {list(offsets.shape)}"
        )
    if dtype not in _OUTPUTS:
        raise ValueError(f"{name}: dtype must be float32, bfloat16, float16 or uint8, not {dtype}")
    check_same_device(name, frames=frames, offsets=offsets)


def _window(
    name: str,
    frames: Tensor,
    offsets: Tensor,
    pad: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    # Reading the values would make a CUDA caller wait and break a traced graph.
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling() and offsets.numel() > 0:
        last_row, last_column = frames.shape[2] + 2 * pad - height, frames.shape[3] + 2 * pad - width
        low, high = offsets.aminmax(dim=0)
        if low.min() < 0 or high[0] > last_row or high[1] > last_column:
            raise ValueError(
                f"{name}: offsets must be in [0, {last_row}] (rows) and [0, {last_column}] (columns), "
                f"found {low.tolist()} to {high.tolist()}"
            )
    if select(name, backend, frames, ("cpp", "cuda"), (torch.uint8,)) == "reference":
        return reference.window(frames, offsets, pad, (height, width), dtype)
    windows: Tensor = torch.ops.covr_fast.window(frames, offsets, pad, height, width, dtype)
    return windows


@operator("window(Tensor frames, Tensor offsets, int pad, int height, int width, ScalarType dtype) -> Tensor")
def _run(frames: Tensor, offsets: Tensor, pad: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    frames, offsets = frames.contiguous(), offsets.contiguous()
    result = empty((*frames.shape[:2], height, width), dtype, frames.device)
    threads = () if frames.is_cuda else (torch.get_num_threads(),)
    launch("window", result, frames, offsets, pad, *threads)
    return result


@fake("window")
def _fake(frames: Tensor, offsets: Tensor, pad: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    return frames.new_empty((*frames.shape[:2], height, width), dtype=dtype)
