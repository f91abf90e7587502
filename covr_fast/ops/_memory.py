"""Memory of large CPU results, used again by later calls."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C

_POOLED = 2**20  # bytes; from about here on page faults outlast the kernels
_IDLE = 512 * 2**20

_pool = _C.OutputPool(_IDLE)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty; large CPU results take memory that earlier ones have left, where there is some.

    The system gives fresh memory page by page, cleared, which takes longer than most kernels take to fill it;
    torch returns it on release, so it would be fresh in every call.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _POOLED:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(_pool.take(size)).view(dtype).view(shape)


def release_memory() -> int:
    """Gives memory of earlier CPU results that no tensor uses any more back to the system.

    Up to 512 MiB of it are kept for later calls otherwise. Returns how many bytes it was.
    """
    idle = _pool.idle
    _pool.release()
    return idle
