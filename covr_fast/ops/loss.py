"""Return-weighted cross-entropy: from logits, and fused with the projection that makes them."""

import torch
from torch import Tensor

# These files define the operators that the functions call.
from . import _logit_rows, _projection, reference  # noqa: F401
from ._backend import Backend, check_floating, check_same_device, select

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def return_weighted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> Tensor:
    """`(weights[:, None] * F.cross_entropy(logits.mT, labels, reduction="none")).sum() / N_v`.

    RALW (Xia et al. 2026, Eq. 6). N_v is `(labels != ignore_index).sum()`: labels of weight zero count too,
    but their logits are never read.

    Args:
        logits: [B, T, V] of float32, bfloat16, float16 (or float64, which runs the reference), aligned with
            `labels`: the caller shifts.
        labels: int64 [B, T], in [0, V) or `ignore_index`.
        weights: floating [B], one per sample, or [B, T], one per label; not negative, constants of the loss.
            Those of ignored labels must be numbers too, but do not matter.
        label_smoothing: in [0, 1], as in torch.nn.functional.cross_entropy.
        backend: "auto", "reference", "cpp" or "triton".

    Returns:
        Scalar, float32 (float64 for float64 logits), differentiable in `logits`. Without a valid label it
        is 0 with zero gradients.

    Raises:
        ValueError: wrong shapes or dtypes; on the CPU also labels out of range and negative weights. A CUDA
            device never reads out of bounds: such a label makes the loss NaN.
    """
    name = "return_weighted_cross_entropy"
    check_floating(name, "logits", logits, "[B, T, V]")
    check_same_device(name, logits=logits, labels=labels)
    _check(name, labels, weights, logits.shape, label_smoothing)
    chosen = select(name, backend, logits, ("cpp", "triton"), _DTYPES)
    if chosen == "reference":
        _check_labels(name, labels, logits.shape[-1], ignore_index)
        return reference.return_weighted_cross_entropy(logits, labels, weights, label_smoothing, ignore_index)
    scale = _row_scale(labels, weights, ignore_index)
    loss: Tensor
    loss, _ = torch.ops.covr_fast.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), scale, label_smoothing, chosen
    )
    return loss


def return_weighted_linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> Tensor:
    """`return_weighted_cross_entropy(F.linear(hidden, head), labels, weights)` without all logits in memory.

    Rows with an ignored label or a zero weight are dropped before the projection. The rest is projected in
    chunks of at most 300 MB of logits (160 MB on the CPU); each chunk's gradient overwrites it and is
    multiplied out at once, so nothing is recomputed in the backward pass. A frozen head (`requires_grad`
    false) skips its product.

    Args:
        hidden: [B, T, D] of float32, bfloat16 or float16 (or float64, which runs the reference).
        head: [V, D] of the same dtype.
        labels, weights, label_smoothing, ignore_index, errors: as in `return_weighted_cross_entropy`.
        backend: "auto", "reference", "cpp" or "triton" (for the kernel on rows of logits).

    Returns:
        Scalar, differentiable once in `hidden` and `head`. The head's gradient is summed in float32.

    On a CUDA device the number of rows to keep has to be known to the host. Labels and weights that are
    still on the CPU give it for free; those on the device are waited for, except while a CUDA graph is
    captured, when all rows are kept instead.
    """
    name = "return_weighted_linear_cross_entropy"
    check_floating(name, "hidden", hidden, "[B, T, D]")
    if head.ndim != 2 or head.shape[1] != hidden.shape[2] or head.dtype != hidden.dtype:
        raise ValueError(
            f"{name}: head must be {hidden.dtype} [V, {hidden.shape[2]}] like hidden, "
            f"not {head.dtype} {list(head.shape)}"
        )
    check_same_device(name, hidden=hidden, head=head)
    if labels.device.type != "cpu":
        check_same_device(name, hidden=hidden, labels=labels)
    _check(name, labels, weights, (*hidden.shape[:2], head.shape[0]), label_smoothing)
    chosen = select(name, backend, hidden, ("cpp", "triton"), _DTYPES)
    if chosen == "reference":
        _check_labels(name, labels, head.shape[0], ignore_index)
        labels, weights = labels.to(hidden.device), weights.to(hidden.device)
        return reference.return_weighted_linear_cross_entropy(
            hidden, head, labels, weights, label_smoothing, ignore_index
        )
    differentiate = torch.is_grad_enabled()
    loss: Tensor
    loss, _, _ = torch.ops.covr_fast.linear_cross_entropy(
        hidden.flatten(0, 1),
        head,
        labels.flatten(),
        _row_scale(labels, weights, ignore_index),
        label_smoothing,
        differentiate and hidden.requires_grad,
        differentiate and head.requires_grad,
        chosen,
    )
    return loss


def _check(name: str, labels: Tensor, weights: Tensor, shape: tuple[int, ...], smoothing: float) -> None:
    batch, steps, vocabulary = shape
    if labels.shape != (batch, steps) or labels.dtype != torch.int64:
        raise ValueError(
            f"{name}: labels must be int64 [{batch}, {steps}], not {labels.dtype} {list(labels.shape)}"
        )
    if weights.shape not in ((batch,), (batch, steps)) or not weights.is_floating_point():
        raise ValueError(
            f"{name}: weights must be floating [{batch}] or [{batch}, {steps}], "
            f"not {weights.dtype} {list(weights.shape)}"
        )
    if vocabulary < 1:
        raise ValueError(f"{name}: the vocabulary is empty")
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing must be in [0, 1], not {smoothing}")
    check_same_device(name, labels=labels, weights=weights)
    if weights.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((weights >= 0).all()):
        raise ValueError(f"{name}: weights must not be negative or NaN; see return_weights")


def _check_labels(name: str, labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
    if wrong.any():
        raise ValueError(f"{name}: label {int(labels[wrong][0])} is not in [0, {vocabulary})")


def _row_scale(labels: Tensor, weights: Tensor, ignore_index: int) -> Tensor:
    """float32 [B * T]: weight / N_v where the label counts, 0 where the row can be skipped."""
    valid = labels != ignore_index
    scale = reference.per_label(weights.detach().float()) / valid.sum().clamp_min(1)
    return torch.where(valid, scale, 0.0).flatten()
