"""RALW, the return-aware adaptive loss weight."""

import torch
from torch import Tensor

from . import reference
from ._backend import Backend, check_floating, fake, launch, operator, select
from ._memory import empty

_DTYPES = (torch.float32,)


def return_weights(returns: Tensor, *, backend: Backend = "auto") -> Tensor:
    """`(2 * (g - g.min()) / (g.max() - g.min()) - 1).clamp_min(0)`, and ones where all returns are equal.

    The weights w_b of Xia et al. 2026, sec. RALW: returns of the samples that the filter kept, scaled to
    [-1, 1], with the lower half of the range cut to zero.

    Args:
        returns: floating [K], finite (the filter has checked); K = 0 gives an empty result.
        backend: "auto", "reference", "cpp" or "cuda". Everything but float32 runs the reference.

    Returns:
        [K] in [0, 1] of the dtype of `returns`, detached: a weight is a constant of the loss.
    """
    check_floating("return_weights", "returns", returns, "[K]")
    returns = returns.detach()
    if select("return_weights", backend, returns, ("cpp", "cuda"), _DTYPES) == "reference":
        return reference.return_weights(returns)
    weights: Tensor = torch.ops.covr_fast.return_weights(returns)
    return weights


@operator("return_weights(Tensor returns) -> Tensor")
def _run(returns: Tensor) -> Tensor:
    returns = returns.contiguous()
    weights = empty(returns.shape, returns.dtype, returns.device)
    extremes = (returns.new_zeros(2, dtype=torch.int32),) if returns.is_cuda else ()
    launch("return_weights", weights, returns, *extremes)
    return weights


@fake("return_weights")
def _fake(returns: Tensor) -> Tensor:
    return torch.empty_like(returns, memory_format=torch.contiguous_format)
