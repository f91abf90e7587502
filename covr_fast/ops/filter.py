"""EDDF, the exploration-driven dynamic filter."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import _C
from . import reference
from ._backend import Backend, check_floating, check_same_device, fake, launch, operator, select
from ._memory import empty

_DTYPES = (torch.float32,)


class ExplorationFilter(NamedTuple):
    """What the filter kept, and by which threshold."""

    indices: Tensor  # int64 [K], ascending: the samples whose z-score is above tau
    tau: float  # the threshold in z units (Eq. 5)
    cutoff: float  # the same in units of the returns: mean + std * tau
    mean: float
    std: float  # of the population (ddof = 0)


class PaddedExplorationFilter(NamedTuple):
    """`ExplorationFilter` with fixed shapes: nothing of it has been read by the host."""

    indices: Tensor  # int64 [M], the first `kept` ascending; the rest is -1
    kept: Tensor  # int64 scalar, or -1 when a return was NaN or infinite
    tau: Tensor  # float64 scalar, as are the following
    cutoff: Tensor
    mean: Tensor
    std: Tensor


def exploration_filter(
    returns: Tensor,
    entropy: float | Tensor,
    *,
    threshold: Literal["described", "equation"] = "described",
    backend: Backend = "auto",
) -> ExplorationFilter:
    """`z = (g - g.mean()) / g.std(correction=0); (z > median(z) + sigmoid(-entropy) * IQR(z)).nonzero()`.

    EDDF (Xia et al. 2026, Eq. 5). Quartiles and median interpolate linearly between ranks, as
    numpy.percentile does. Equal returns (also a single one) have no spread and keep nothing.

    Args:
        returns: floating [M], M >= 1, finite. float64 runs the reference.
        entropy: the policy's entropy e_t in nats; a number, or a floating scalar on the returns' device.
        threshold: "described" is what the paper's text says, sigmoid(-entropy): a high entropy lowers the
            threshold, and the filter gets stricter as the policy settles. "equation" is Eq. 5 as printed,
            sigmoid(+entropy), which does the opposite.
        backend: "auto", "reference", "cpp" or "cuda".

    Raises:
        ValueError: empty returns, or a NaN or infinite one.

    The numbers in the result are Python floats, so on a CUDA device this waits for the kernel; see
    `exploration_filter_padded` for the form that does not.
    """
    flat, chosen = _prepare("exploration_filter", returns, entropy, threshold, backend)
    scale = _scale("exploration_filter", float(entropy), threshold)
    if chosen == "reference":
        if not torch.isfinite(flat).all():
            raise ValueError(_NOT_FINITE)
        indices, statistics = reference.exploration_filter(flat, scale)
    else:
        indices, statistics = torch.ops.covr_fast.exploration_filter(flat, scale)
    if torch.compiler.is_compiling():  # a tracer takes item(), where capture_scalar_outputs is set
        return ExplorationFilter(indices, *(value.item() for value in statistics.unbind()))
    return ExplorationFilter(indices, *statistics.tolist())


def exploration_filter_padded(
    returns: Tensor,
    entropy: float | Tensor,
    *,
    threshold: Literal["described", "equation"] = "described",
    backend: Backend = "auto",
) -> PaddedExplorationFilter:
    """`exploration_filter` with the count left on the device: no host synchronisation, and CUDA graph safe.

    Arguments as in `exploration_filter`. A NaN or infinite return, or such an entropy on a GPU, cannot raise
    here without waiting for the device: it gives kept -1, indices all -1 and NaN statistics instead.
    """
    name = "exploration_filter_padded"
    flat, chosen = _prepare(name, returns, entropy, threshold, backend)
    scale = _scale_tensor(name, entropy, threshold, flat.device)
    if chosen == "reference":
        indices, count, statistics = _padded_reference(flat, scale)
    else:
        indices, count, statistics = torch.ops.covr_fast.exploration_filter_padded(flat, scale)
    return PaddedExplorationFilter(indices, count, *statistics.unbind())


_NOT_FINITE = "exploration_filter: returns hold a NaN or infinite value; drop or repair those samples first"


def _prepare(
    name: str, returns: Tensor, entropy: float | Tensor, threshold: str, backend: str
) -> tuple[Tensor, str]:
    """The returns as the kernels take them, and the backend to run."""
    check_floating(name, "returns", returns, "[M]")
    if returns.numel() == 0:
        raise ValueError(f"{name}: returns are empty; there is nothing to take quartiles of")
    if isinstance(entropy, Tensor):
        if entropy.ndim or not entropy.is_floating_point():
            raise ValueError(
                f"{name}: entropy must be a number or a floating scalar, "
                f"not {entropy.dtype} {list(entropy.shape)}"
            )
        check_same_device(name, returns=returns, entropy=entropy)
    if threshold not in ("described", "equation"):
        raise ValueError(f"{name}: threshold must be 'described' or 'equation', not {threshold!r}")
    flat = returns.detach()
    if flat.dtype not in (torch.float32, torch.float64):
        flat = flat.float()
    return flat.contiguous(), select(name, backend, flat, ("cpp", "cuda"), _DTYPES)


def _scale(name: str, entropy: float, threshold: str) -> float:
    """The sigmoid of Eq. 5."""
    if not math.isfinite(entropy):
        raise ValueError(f"{name}: entropy must be finite, not {entropy}")
    return _sigmoid(entropy if threshold == "equation" else -entropy)


def _scale_tensor(name: str, entropy: float | Tensor, threshold: str, device: torch.device) -> Tensor:
    """The same as a float64 scalar on `device`, for which nothing waits; NaN if the entropy is infinite."""
    if isinstance(entropy, Tensor) and (entropy.device.type != "cpu" or torch.compiler.is_compiling()):
        wide = entropy.detach().double()
        # A sigmoid would hide an infinity.
        return torch.sigmoid(wide if threshold == "equation" else -wide) + 0 * wide
    return torch.full((), _scale(name, float(entropy), threshold), dtype=torch.float64, device=device)


def _sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow on either side."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def _padded_reference(returns: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    finite = bool(torch.isfinite(returns).all() & torch.isfinite(scale))
    return _pad(returns, reference.exploration_filter(returns, scale) if finite else None)


def _pad(returns: Tensor, result: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Padded indices, their count, and statistics of kept indices and statistics; None: not finite."""
    indices = torch.full(returns.shape, -1, dtype=torch.int64, device=returns.device)
    if result is None:
        return indices, indices.new_tensor(-1), returns.new_full((4,), math.nan, dtype=torch.float64)
    kept, statistics = result
    indices[: kept.numel()] = kept
    return indices, indices.new_tensor(kept.numel()), statistics


def _cpp(returns: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """Kept indices and statistics; None where a return is not finite."""
    statistics = torch.empty(4, dtype=torch.float64, device=returns.device)
    threads = torch.get_num_threads()
    # The count comes first, so that only the kept indices are allocated.
    count = _C.exploration_threshold(returns, scale, statistics, threads)
    if count < 0:
        return None
    indices = empty((count,), torch.int64, returns.device)
    if count:
        _C.indices_above(returns, float(statistics[1]), indices, threads)
    return indices, statistics


@operator(
    "exploration_filter_padded(Tensor returns, Tensor scale) "
    "-> (Tensor indices, Tensor count, Tensor statistics)"
)
def _run_padded(returns: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    returns = returns.contiguous()
    if not returns.is_cuda:
        return _pad(returns, _cpp(returns, float(scale)) if scale.isfinite() else None)
    indices = torch.empty_like(returns, dtype=torch.int64)
    kept = indices.new_empty(())
    statistics = returns.new_empty(4, dtype=torch.float64)
    workspace = returns.new_zeros(_C.exploration_filter_workspace(returns.numel()), dtype=torch.uint8)
    launch("exploration_filter", returns, scale, indices, kept, statistics, workspace)
    return indices, kept, statistics


@operator("exploration_filter(Tensor returns, float scale) -> (Tensor indices, Tensor statistics)")
def _run(returns: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if returns.is_cuda:
        on_device = returns.new_full((), scale, dtype=torch.float64)
        indices, kept, statistics = _run_padded(returns, on_device)
        count = int(kept)  # the one wait: the result's shape depends on it
        if count >= 0:
            return indices[:count], statistics
    elif (result := _cpp(returns.contiguous(), scale)) is not None:
        return result
    raise ValueError(_NOT_FINITE)


@fake("exploration_filter")
def _fake(returns: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    kept = torch.library.get_ctx().new_dynamic_size()
    return returns.new_empty(kept, dtype=torch.int64), returns.new_empty(4, dtype=torch.float64)


@fake("exploration_filter_padded")
def _fake_padded(returns: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    indices = returns.new_empty(returns.shape, dtype=torch.int64)
    return indices, indices.new_empty(()), returns.new_empty(4, dtype=torch.float64)
