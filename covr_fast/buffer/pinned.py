"""Host memory that a GPU reads and writes in place."""

import math
import warnings

import torch
from torch import Tensor

from .. import _C
from .options import Shape


def pinned_empty(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty(shape, dtype=dtype, pin_memory=True)`, but of its exact size: torch rounds pinned blocks
    up to powers of two. Where the driver cannot pin existing pages, there is a warning and torch allocates.

    `device` is the GPU that will use it. The memory is freed with the last tensor that shares it; that waits
    for the GPU.

    Raises:
        MemoryError, RuntimeError: the memory cannot be had.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    try:
        with torch.cuda.device(device):
            pages = _C.pinned_array_cuda(nbytes)
    except RuntimeError as error:
        warnings.warn(
            f"the driver cannot pin {nbytes} bytes of existing memory ({error}): torch's pinned memory is "
            "used instead, which takes up to twice the size",
            stacklevel=2,
        )
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
    return torch.from_numpy(pages).view(dtype).view(shape)
