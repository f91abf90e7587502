"""Return-weighted cross-entropy: from logits, and fused with the projection that makes them."""

import functools

import torch
from torch import Tensor

from covr_fast import _C

from . import reference
from ._backend import Backend, check_floating, check_same_device, library, select
from ._memory import empty

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Memory for one chunk of logits in the fused loss. On the CPU its first touch costs more than larger products
# gain; on a GPU every further chunk reads and writes the sum of the head's gradient once more.
_CHUNK_BYTES = {"cpu": 160 * 2**20, "cuda": 300 * 2**20}

# Probabilities of a large vocabulary are subnormal in float16 (1 / 151,936 = 6.6e-6, and N_v divides them
# further), so there the gradient of the logits is kept at this multiple until after the matrix product.
_HALF_SCALE = 256.0


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

    RALW (Xia et al. 2026, Eq. 6). N_v is `(labels != ignore_index).sum()`: the labels of zero-weight
    samples count too, but their logits are never read.

    Args:
        logits: [B, T, V] of float32, bfloat16, float16 (or float64, which runs the reference), aligned with
            `labels`: the caller shifts.
        labels: int64 [B, T], in [0, V) or `ignore_index`.
        weights: floating [B], not negative; constants of the loss.
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
        return reference.return_weighted_linear_cross_entropy(
            hidden,
            head,
            labels.to(hidden.device),
            weights.to(hidden.device),
            label_smoothing,
            ignore_index,
        )
    differentiate = torch.is_grad_enabled()
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
    if weights.shape != (batch,) or not weights.is_floating_point():
        raise ValueError(
            f"{name}: weights must be floating [{batch}], not {weights.dtype} {list(weights.shape)}"
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
    """float32 [B * T]: w_b / N_v where the label counts, 0 where the row can be skipped."""
    valid = labels != ignore_index
    scale = weights.detach().float()[:, None] / valid.sum().clamp_min(1)
    return torch.where(valid, scale, 0.0).flatten()


# --- Rows of logits: one kernel that reduces a row, and one that writes its gradient.


def _reduce_rows(
    logits: Tensor, labels: Tensor, scale: Tensor, smoothing: float, backend: str
) -> tuple[Tensor, Tensor]:
    """scale * nll [R], and the row's maximum and log-sum-exp relative to it [2, R], all float32.

    Rows of scale zero are not read. Maximum and sum stay apart so that huge logits lose no precision.
    """
    if backend == "triton":
        from covr_fast.kernels.triton import loss as kernels

        return kernels.reduce_rows(logits, labels, scale, smoothing)
    losses, normaliser = torch.empty_like(scale), scale.new_empty(2, scale.numel())
    threads = torch.get_num_threads()
    _C.cross_entropy_reduce(losses, normaliser, logits, labels, scale, smoothing, threads)
    return losses, normaliser


def _write_gradient(
    out: Tensor,
    logits: Tensor,
    labels: Tensor,
    scale: Tensor,
    smoothing: float,
    normaliser: Tensor,
    upstream: Tensor,
    backend: str,
) -> None:
    """out = upstream * scale * (softmax(logits) - smoothed one-hot); may be in place."""
    if backend == "triton":
        from covr_fast.kernels.triton import loss as kernels

        kernels.write_gradient(out, logits, labels, scale, smoothing, normaliser, upstream)
    else:
        threads = torch.get_num_threads()
        _C.cross_entropy_gradient(out, normaliser, float(upstream), logits, labels, scale, smoothing, threads)


library.define(
    "cross_entropy(Tensor logits, Tensor labels, Tensor scale, float smoothing, str backend) "
    "-> (Tensor loss, Tensor normaliser)"
)
library.define(
    "cross_entropy_backward(Tensor upstream, Tensor logits, Tensor labels, Tensor scale, float smoothing, "
    "Tensor normaliser, str backend) -> Tensor"
)


@torch.library.impl("covr_fast::cross_entropy", ("cpu", "cuda"), lib=library)
def _cross_entropy(
    logits: Tensor, labels: Tensor, scale: Tensor, smoothing: float, backend: str
) -> tuple[Tensor, Tensor]:
    losses, normaliser = _reduce_rows(logits.contiguous(), labels.contiguous(), scale, smoothing, backend)
    return losses.sum(), normaliser


@torch.library.impl("covr_fast::cross_entropy_backward", ("cpu", "cuda"), lib=library)
def _cross_entropy_backward(
    upstream: Tensor,
    logits: Tensor,
    labels: Tensor,
    scale: Tensor,
    smoothing: float,
    normaliser: Tensor,
    backend: str,
) -> Tensor:
    logits = logits.contiguous()
    gradient = empty(logits.shape, logits.dtype, logits.device)
    _write_gradient(gradient, logits, labels.contiguous(), scale, smoothing, normaliser, upstream, backend)
    return gradient


@torch.library.register_fake("covr_fast::cross_entropy", lib=library)
def _fake_cross_entropy(
    logits: Tensor, labels: Tensor, scale: Tensor, smoothing: float, backend: str
) -> tuple[Tensor, Tensor]:
    return scale.new_empty(()), scale.new_empty(2, scale.numel())


@torch.library.register_fake("covr_fast::cross_entropy_backward", lib=library)
def _fake_cross_entropy_backward(
    upstream: Tensor,
    logits: Tensor,
    labels: Tensor,
    scale: Tensor,
    smoothing: float,
    normaliser: Tensor,
    backend: str,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_cross_entropy(ctx, inputs, output):
    logits, labels, scale, ctx.smoothing, ctx.backend = inputs
    ctx.save_for_backward(logits, labels, scale, output[1])


def _differentiate_cross_entropy(ctx, upstream, _):
    logits, labels, scale, normaliser = ctx.saved_tensors
    gradient = torch.ops.covr_fast.cross_entropy_backward(
        upstream, logits, labels, scale, ctx.smoothing, normaliser, ctx.backend
    )
    return gradient, None, None, None, None


torch.library.register_autograd(
    "covr_fast::cross_entropy",
    _differentiate_cross_entropy,
    setup_context=_save_cross_entropy,
    lib=library,
)


# --- Fused with the projection.

library.define(
    "linear_cross_entropy(Tensor hidden, Tensor head, Tensor labels, Tensor scale, float smoothing, "
    "bool hidden_needs_gradient, bool head_needs_gradient, str backend) "
    "-> (Tensor loss, Tensor hidden_gradient, Tensor head_gradient)"
)


@torch.library.impl("covr_fast::linear_cross_entropy", ("cpu", "cuda"), lib=library)
def _linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    scale: Tensor,
    smoothing: float,
    hidden_needs_gradient: bool,
    head_needs_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, head = hidden.contiguous(), head.contiguous()
    kept, kept_labels, kept_scale = _compact(labels, scale, hidden.device)
    rows = hidden if kept is None else hidden.index_select(0, kept)
    # Undone on the products, which float16 holds better than their factors.
    lift = _HALF_SCALE if hidden.dtype == torch.float16 else 1.0

    losses = torch.zeros(max(1, rows.shape[0]), dtype=torch.float32, device=hidden.device)
    row_gradient = torch.empty_like(rows) if hidden_needs_gradient else None
    upstream = torch.ones((), dtype=torch.float32, device="cpu" if backend == "cpp" else hidden.device)
    chunks = _chunks(rows.shape[0], head.shape[0] * head.element_size(), _CHUNK_BYTES[hidden.device.type])
    largest = max((end - begin for begin, end in chunks), default=0)
    buffer = empty((largest, head.shape[0]), head.dtype, head.device)
    head_sum: Tensor | None = None
    if head_needs_gradient and chunks:
        # One product rounds once whatever it is kept in; only a sum of several needs the wider type.
        dtype = head.dtype if len(chunks) == 1 and lift == 1.0 else torch.float32
        head_sum = empty(head.shape, dtype, head.device)
    for begin, end in chunks:
        chunk, labels_, scale_ = rows[begin:end], kept_labels[begin:end], kept_scale[begin:end]
        logits = torch.mm(chunk, head.T, out=buffer[: end - begin])
        losses[begin:end], normaliser = _reduce_rows(logits, labels_, scale_, smoothing, backend)
        if not (hidden_needs_gradient or head_needs_gradient):
            continue
        _write_gradient(logits, logits, labels_, scale_ * lift, smoothing, normaliser, upstream, backend)
        if row_gradient is not None:
            torch.mm(logits, head, out=row_gradient[begin:end])
        if head_sum is not None:
            _add_product(head_sum, logits.T, chunk, first=begin == 0)

    hidden_gradient = hidden.new_zeros(hidden.shape if hidden_needs_gradient else 0)
    if row_gradient is not None:
        row_gradient.div_(lift)
        if kept is None:
            hidden_gradient = row_gradient
        else:
            hidden_gradient.index_copy_(0, kept, row_gradient)
    if head_sum is not None:
        head_gradient = head_sum.div_(lift).to(head.dtype) if lift != 1.0 else head_sum.to(head.dtype)
    else:
        head_gradient = torch.zeros_like(head) if head_needs_gradient else head.new_empty(0)
    return losses.sum(), hidden_gradient, head_gradient


def _compact(labels: Tensor, scale: Tensor, device: torch.device) -> tuple[Tensor | None, Tensor, Tensor]:
    """Rows that contribute, with their labels and scales on `device`; None means all of them."""
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return None, labels.contiguous(), scale
    kept = scale.nonzero().squeeze(1)
    if kept.numel() == labels.numel():
        return None, labels.contiguous().to(device, non_blocking=True), scale.to(device, non_blocking=True)
    return (
        kept.to(device, non_blocking=True),
        labels[kept].to(device, non_blocking=True),
        scale[kept].to(device, non_blocking=True),
    )


def _chunks(rows: int, bytes_per_row: int, most_bytes: int) -> list[tuple[int, int]]:
    """Equal pieces of at most `most_bytes` (and at least one row)."""
    largest = max(1, most_bytes // bytes_per_row)
    pieces = -(-rows // largest)
    return [(rows * i // pieces, rows * (i + 1) // pieces) for i in range(pieces)]


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total = a @ b for the first chunk, total += a @ b after it; total may be float32 where they are not."""
    if total.dtype != a.dtype and _adds_in_float32(a.dtype, a.device):
        torch.addmm(total, a, b, beta=0 if first else 1, out_dtype=torch.float32, out=total)
    elif total.dtype != a.dtype:  # each product is rounded before it is added
        product = torch.mm(a, b)
        total.copy_(product) if first else total.add_(product)
    elif first:
        torch.mm(a, b, out=total)
    else:
        total.addmm_(a, b)


@functools.cache
def _adds_in_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch adds a product of `dtype` to a float32 sum without rounding it in between.

    It does on CUDA devices; torch 2.8 has the call, but wants the sum in the dtype of the factors.
    """
    a = torch.zeros(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        return False
    return True


@torch.library.register_fake("covr_fast::linear_cross_entropy", lib=library)
def _fake_linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    scale: Tensor,
    smoothing: float,
    hidden_needs_gradient: bool,
    head_needs_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(hidden.shape if hidden_needs_gradient else 0),
        head.new_empty(head.shape if head_needs_gradient else 0),
    )


# gradient * upstream: not in place, since the graph may be walked again, and an operator of its own only for
# the memory that a head's gradient needs.
library.define("scale_gradient(Tensor gradient, Tensor upstream) -> Tensor")


@torch.library.impl("covr_fast::scale_gradient", ("cpu", "cuda"), lib=library)
def _scale_gradient(gradient: Tensor, upstream: Tensor) -> Tensor:
    scaled = empty(gradient.shape, gradient.dtype, gradient.device)
    return torch.mul(gradient, upstream.to(gradient.dtype), out=scaled)


@torch.library.register_fake("covr_fast::scale_gradient", lib=library)
def _fake_scale_gradient(gradient: Tensor, upstream: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _save_linear_cross_entropy(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # or the unused gradient outputs get zeros as large as the head
    ctx.save_for_backward(*output[1:])
    ctx.hidden_needs_gradient, ctx.head_needs_gradient = inputs[5:7]


def _differentiate_linear_cross_entropy(ctx, upstream, *_):
    hidden_gradient, head_gradient = ctx.saved_tensors
    return (
        _times(hidden_gradient, upstream) if ctx.hidden_needs_gradient else None,
        _times(head_gradient, upstream) if ctx.head_needs_gradient else None,
        *(None,) * 6,
    )


def _times(gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient * upstream; `gradient` itself where that is certain to be the same and nobody needs it again.

    `loss.backward()` begins with 1, and a head's gradient is large. Only a plain CPU tensor may be looked at:
    a traced one has no value, and one on a GPU would have to be waited for.
    """
    plain = type(upstream) is Tensor and upstream.device.type == "cpu"
    if plain and float(upstream) == 1.0 and not torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient
    return torch.ops.covr_fast.scale_gradient(gradient, upstream)


torch.library.register_autograd(
    "covr_fast::linear_cross_entropy",
    _differentiate_linear_cross_entropy,
    setup_context=_save_linear_cross_entropy,
    lib=library,
)
