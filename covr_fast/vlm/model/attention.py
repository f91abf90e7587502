"""Which attention implementation a model runs with, and attention within segments by torch's SDPA."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.utils.import_utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
)

CHOICES = ("auto", "flash_attention_4", "flash_attention_3", "flash_attention_2", "sdpa", "eager")
SEGMENTED_SDPA = "covr_segmented_flash_sdpa"
"""`segmented_sdpa` in transformers' registry. Vision towers pass `cu_seqlens` to names that say "flash"."""

_FLASH = {
    # name: (package, transformers' check for it, compute capabilities of the GPUs from and below). Versions 2
    # and 4 share the module `flash_attn`, so the check looks at the package's name too. transformers compares
    # the capability only where the package is missing, and accepts any dtype. The kernels of version 3 are
    # compiled for Hopper, and later GPUs cannot run them.
    "flash_attention_4": ("flash-attn-4", is_flash_attn_4_available, (9, 0), None),
    "flash_attention_3": ("flash-attn-3", is_flash_attn_3_available, (9, 0), (10, 0)),
    "flash_attention_2": ("flash-attn", is_flash_attn_2_available, (8, 0), None),
}


@dataclass(frozen=True)
class AttentionChoice:
    """The attention implementation to load a model with."""

    name: str
    """As transformers names it."""
    reason: str
    """Why this one and no other, for people."""


def choose_attention(requested: str, device: torch.device, dtype: torch.dtype) -> AttentionChoice:
    """The attention implementation that `requested` means here.

    "auto" takes the newest FlashAttention that is installed and fits the GPU and dtype, else torch's SDPA
    (which on CUDA uses FlashAttention too). A ValueError says why another request cannot run here.
    """
    if requested not in CHOICES:
        raise ValueError(f"attention={requested!r} is not one of {', '.join(CHOICES)}")
    if requested != "auto":
        if (reason := _why_not(requested, device, dtype)) is not None:
            raise ValueError(f"attention={requested!r} cannot run here: {reason}; use attention='auto'")
        return AttentionChoice(requested, "as asked")
    if (reason := _no_flash(device, dtype)) is not None:
        return AttentionChoice("sdpa", f"FlashAttention cannot run: {reason}")
    reasons: list[str] = []
    for name in _FLASH:
        if (reason := _why_not(name, device, dtype)) is None:
            return AttentionChoice(name, "; ".join([*reasons, "the newest that can run here"]))
        reasons.append(f"{name}: {reason}")
    return AttentionChoice("sdpa", "; ".join(reasons))


def is_flash(attention: str) -> bool:
    """Whether `attention` is one of FlashAttention's implementations."""
    return attention in _FLASH


def _why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this implementation cannot run, or None. SDPA and eager attention always can."""
    if name not in _FLASH:
        return None
    if (reason := _no_flash(device, dtype)) is not None:
        return reason
    package, installed, first, end = _FLASH[name]
    capability = torch.cuda.get_device_capability(device)
    if capability < first or (end is not None and capability >= end):
        needed = "at least {}.{}".format(*first) + (" and below {}.{}".format(*end) if end else "")
        return f"it needs compute capability {needed}, and the GPU has {capability[0]}.{capability[1]}"
    return None if installed() else f"{package} is not installed"


def _no_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no version of FlashAttention can run, or None."""
    if device.type != "cuda":
        return f"the device is {device.type}, not cuda"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the dtype is {dtype}, not float16 or bfloat16"
    return None


def causal_mask(queries: int, past: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1, 1, queries, past + queries], added to attention scores: 0 where a query may look (the `past` keys,
    the earlier queries' keys and its own), the lowest number elsewhere."""
    mask = torch.full((queries, past + queries), torch.finfo(dtype).min, dtype=dtype, device=device)
    return mask.triu_(past + 1)[None, None]


def segmented_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Bidirectional attention within each segment of a single row. Segments follow each other.

    Equal segments (images of one size give these) become the batch of one SDPA call. Unequal ones are padded
    to `max_length_q`, the longest. The host never reads `cu_seq_lens_q` (int[segments + 1], where they begin
    and end), so it does not wait for the device.

    `query`, `key` and `value` are [1, heads, S, head_dim]. Returns [1, S, heads, head_dim].
    """
    _, heads, total, dim = query.shape
    segments = cu_seq_lens_q.shape[0] - 1
    if segments * max_length_q == total:
        q, k, v = (x[0].unflatten(1, (segments, max_length_q)).transpose(0, 1) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, scale=scaling, dropout_p=dropout)
        return out.transpose(1, 2).reshape(1, total, heads, dim), None

    start, end = cu_seq_lens_q[:-1, None].long(), cu_seq_lens_q[1:, None].long()
    place = start + torch.arange(max_length_q, device=query.device)
    valid = place < end
    place = place.clamp(max=total - 1)
    q, k, v = (x[0][:, place].transpose(0, 1) for x in (query, key, value))
    mask = valid[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, dropout_p=dropout)
    token = torch.arange(total, device=query.device)
    segment = torch.searchsorted(cu_seq_lens_q.long(), token, right=True) - 1
    return out[segment, :, token - start[segment, 0]][None], None


AttentionInterface.register(SEGMENTED_SDPA, segmented_sdpa)
