"""Rows of logits for the return-weighted cross-entropy: reduce a row, and write its gradient in place.

The reduction is one program per row that walks the vocabulary in blocks and keeps running maxima and sums.
Rows of scale zero are not read. A label outside the vocabulary is never used as an address: it makes the row
NaN.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

_BLOCK = 4096


@triton.jit
def _reduce_rows(
    losses,
    peaks,
    log_sums,
    logits,
    labels,
    scale,
    vocabulary,
    smoothing,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(scale + row)
    if weight == 0.0:
        tl.store(losses + row, 0.0)
        tl.store(peaks + row, 0.0)
        tl.store(log_sums + row, 0.0)
        return
    start = logits + row * vocabulary
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    plain = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, vocabulary, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < vocabulary
        x = tl.load(start + column, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, x)
        # Every lane keeps its own maximum: no reduction across lanes until the row is done. A lane that has
        # seen nothing but -inf holds 0, not exp(-inf - -inf).
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - anchor) + tl.exp(x - anchor)
        peak = higher
        if SMOOTH:
            plain += tl.where(inside, x, 0.0)
    highest = tl.max(peak, axis=0)
    anchor = tl.where(highest == float("-inf"), 0.0, highest)
    log_sum = tl.log(tl.sum(total * tl.exp(peak - anchor), axis=0))
    label = tl.load(labels + row)
    valid = (label >= 0) & (label < vocabulary)
    x_label = tl.load(start + label, mask=valid, other=float("nan")).to(tl.float32)
    # Differences to the maximum, so that an offset common to all logits costs no precision.
    loss = log_sum + (1.0 - smoothing) * (highest - x_label)
    if SMOOTH:
        loss += smoothing * (highest - tl.sum(plain, axis=0) / vocabulary)
    tl.store(losses + row, weight * loss)
    tl.store(peaks + row, highest)
    tl.store(log_sums + row, log_sum)


@triton.jit
def _write_gradient(
    out, logits, labels, scale, peaks, log_sums, upstream, vocabulary, smoothing, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocabulary
    element = row * vocabulary + column
    weight = tl.load(scale + row)
    if weight == 0.0:
        tl.store(out + element, tl.zeros((BLOCK,), out.dtype.element_ty), mask=inside)
        return
    label = tl.load(labels + row)
    factor = tl.load(upstream).to(tl.float32) * weight
    factor = tl.where((label >= 0) & (label < vocabulary), factor, float("nan"))
    x = tl.load(logits + element, mask=inside, other=0.0).to(tl.float32)
    target = tl.where(column == label, 1.0 - smoothing, 0.0) + smoothing / vocabulary
    gradient = factor * (tl.exp(x - tl.load(peaks + row) - tl.load(log_sums + row)) - target)
    tl.store(out + element, gradient.to(out.dtype.element_ty), mask=inside)


def reduce_rows(logits: Tensor, labels: Tensor, scale: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """scale * nll [R], and [2, R] maximum and log-sum-exp relative to it, of contiguous logits [R, V]."""
    losses, normaliser = torch.empty_like(scale), scale.new_empty(2, scale.numel())
    rows, vocabulary = logits.shape
    if rows:
        block = min(_BLOCK, triton.next_power_of_2(vocabulary))
        _reduce_rows[(rows,)](
            losses,
            normaliser[0],
            normaliser[1],
            logits,
            labels,
            scale,
            vocabulary,
            smoothing,
            SMOOTH=smoothing > 0,
            BLOCK=block,
            num_warps=8,
        )
    return losses, normaliser


def write_gradient(
    out: Tensor,
    logits: Tensor,
    labels: Tensor,
    scale: Tensor,
    smoothing: float,
    normaliser: Tensor,
    upstream: Tensor,
) -> None:
    """out = upstream * scale * (softmax(logits) - smoothed one-hot), [R, V]; out may be logits."""
    rows, vocabulary = logits.shape
    if rows:
        block = min(_BLOCK, triton.next_power_of_2(vocabulary))
        _write_gradient[(rows, triton.cdiv(vocabulary, block))](
            out,
            logits,
            labels,
            scale,
            normaliser[0],
            normaliser[1],
            upstream,
            vocabulary,
            smoothing,
            BLOCK=block,
            num_warps=8,
        )
