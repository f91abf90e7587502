"""The operator that fuses the projection `hidden @ head.T` with the loss: logits exist only in chunks."""

import functools
from typing import Any

import torch
from torch import Tensor

from ._backend import fake, library, operator
from ._logit_rows import reduce_rows, write_gradient
from ._memory import empty

# Memory for one chunk of logits in the fused loss. On the CPU its first touch costs more than larger products
# gain; on a GPU every further chunk reads and writes the sum of the head's gradient once more.
CHUNK_BYTES = {"cpu": 160 * 2**20, "cuda": 300 * 2**20}

# Probabilities of a large vocabulary are subnormal in float16 (1 / 151,936 = 6.6e-6, and N_v divides them
# further), so there the gradient of the logits is kept at this multiple until after the matrix product.
_HALF_SCALE = 256.0


@operator(
    "linear_cross_entropy(Tensor hidden, Tensor head, Tensor labels, Tensor scale, float smoothing, "
    "bool hidden_needs_gradient, bool head_needs_gradient, str backend) "
    "-> (Tensor loss, Tensor hidden_gradient, Tensor head_gradient)"
)
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
    # Undone on the products, which float16 represents better than their factors.
    lift = _HALF_SCALE if hidden.dtype == torch.float16 else 1.0

    losses = torch.zeros(max(1, rows.shape[0]), dtype=torch.float32, device=hidden.device)
    row_gradient = torch.empty_like(rows) if hidden_needs_gradient else None
    upstream = torch.ones((), dtype=torch.float32, device="cpu" if backend == "cpp" else hidden.device)
    chunks = _chunks(rows.shape[0], head.shape[0] * head.element_size(), CHUNK_BYTES[hidden.device.type])
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
        losses[begin:end], normaliser = reduce_rows(logits, labels_, scale_, smoothing, backend)
        if not (hidden_needs_gradient or head_needs_gradient):
            continue
        write_gradient(logits, logits, labels_, scale_ * lift, smoothing, normaliser, upstream, backend)
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


@fake("linear_cross_entropy")
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
@operator("scale_gradient(Tensor gradient, Tensor upstream) -> Tensor")
def _scale_gradient(gradient: Tensor, upstream: Tensor) -> Tensor:
    scaled = empty(gradient.shape, gradient.dtype, gradient.device)
    return torch.mul(gradient, upstream.to(gradient.dtype), out=scaled)


@fake("scale_gradient")
def _fake_scale_gradient(gradient: Tensor, upstream: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _save_linear_cross_entropy(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)  # or the unused gradient outputs get zeros as large as the head
    ctx.save_for_backward(*output[1:])
    ctx.hidden_needs_gradient, ctx.head_needs_gradient = inputs[5:7]


def _differentiate_linear_cross_entropy(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
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
    scaled: Tensor = torch.ops.covr_fast.scale_gradient(gradient, upstream)
    return scaled


torch.library.register_autograd(
    "covr_fast::linear_cross_entropy",
    _differentiate_linear_cross_entropy,
    setup_context=_save_linear_cross_entropy,
    lib=library,
)
