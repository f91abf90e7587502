"""The operator on rows of logits: one kernel reduces a row to its loss, another one writes its gradient."""

from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..streams import current_on
from ._backend import fake, library, operator
from ._memory import empty


def reduce_rows(
    logits: Tensor, labels: Tensor, scale: Tensor, smoothing: float, backend: str
) -> tuple[Tensor, Tensor]:
    """scale * nll [R], and the row's maximum and log-sum-exp relative to it [2, R], all float32.

    Rows of scale zero are not read. Maximum and sum stay apart so that huge logits lose no precision.
    """
    if backend == "triton":
        from ..kernels.triton import loss as kernels

        with current_on(logits.device):  # Triton launches there
            reduced: tuple[Tensor, Tensor] = kernels.reduce_rows(logits, labels, scale, smoothing)
        return reduced
    losses, normaliser = torch.empty_like(scale), scale.new_empty(2, scale.numel())
    threads = torch.get_num_threads()
    _C.cross_entropy_reduce(losses, normaliser, logits, labels, scale, smoothing, threads)
    return losses, normaliser


def write_gradient(
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
        from ..kernels.triton import loss as kernels

        with current_on(logits.device):
            kernels.write_gradient(out, logits, labels, scale, smoothing, normaliser, upstream)
    else:
        threads = torch.get_num_threads()
        _C.cross_entropy_gradient(out, normaliser, float(upstream), logits, labels, scale, smoothing, threads)


@operator(
    "cross_entropy(Tensor logits, Tensor labels, Tensor scale, float smoothing, str backend) "
    "-> (Tensor loss, Tensor normaliser)"
)
def _cross_entropy(
    logits: Tensor, labels: Tensor, scale: Tensor, smoothing: float, backend: str
) -> tuple[Tensor, Tensor]:
    losses, normaliser = reduce_rows(logits.contiguous(), labels.contiguous(), scale, smoothing, backend)
    return losses.sum(), normaliser


@operator(
    "cross_entropy_backward(Tensor upstream, Tensor logits, Tensor labels, Tensor scale, float smoothing, "
    "Tensor normaliser, str backend) -> Tensor"
)
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
    write_gradient(gradient, logits, labels.contiguous(), scale, smoothing, normaliser, upstream, backend)
    return gradient


@fake("cross_entropy")
def _fake_cross_entropy(logits: Tensor, labels: Tensor, scale: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return scale.new_empty(()), scale.new_empty(2, scale.numel())


@fake("cross_entropy_backward")
def _fake_cross_entropy_backward(upstream: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_cross_entropy(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, labels, scale, ctx.smoothing, ctx.backend = inputs
    ctx.save_for_backward(logits, labels, scale, output[1])


def _differentiate_cross_entropy(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    logits, labels, scale, normaliser = ctx.saved_tensors
    gradient = torch.ops.covr_fast.cross_entropy_backward(
        upstream, logits, labels, scale, ctx.smoothing, normaliser, ctx.backend
    )
    return gradient, None, None, None, None


torch.library.register_autograd(
    "covr_fast::cross_entropy", _differentiate_cross_entropy, setup_context=_save_cross_entropy, lib=library
)
