"""Which attention implementation a model runs with, and variable-length attention on top of torch's SDPA."""

import importlib.util
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

CHOICES = ("auto", "flash_attention_4", "flash_attention_3", "flash_attention_2", "sdpa", "eager")
SEGMENTED_SDPA = "covr_segmented_flash_sdpa"
"""`segmented_sdpa` in transformers' registry. Vision towers give `cu_seqlens` to names that say "flash"."""

_FLASH = {
    # name: (module, lowest compute capability, what it needs)
    "flash_attention_4": ("flash_attn.cute", (9, 0), "flash-attn-4 and a Hopper or newer GPU"),
    "flash_attention_3": ("flash_attn_interface", (9, 0), "flash-attn 3 and a Hopper GPU"),
    "flash_attention_2": ("flash_attn", (8, 0), "flash-attn and an Ampere or newer GPU"),
}


def choose_attention(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """The attention implementation to load a model with, in transformers' naming.

    "auto" takes the newest FlashAttention that is installed and fits the GPU and dtype, else torch's SDPA
    (whose CUDA path is FlashAttention too). The choice and its reason are logged.

    Raises:
        ValueError: `requested` is unknown, or cannot run here; the message says what is missing.
    """
    if requested not in CHOICES:
        raise ValueError(f"attention={requested!r} is not one of {', '.join(CHOICES)}")
    if requested in ("sdpa", "eager"):
        log.info("attention: %s, as requested", requested)
        return requested
    if requested in _FLASH:
        if (missing := _missing(requested, device, dtype)) is not None:
            raise ValueError(f"attention={requested!r} cannot run here: {missing}; use attention='auto'")
        log.info("attention: %s, as requested", requested)
        return requested
    reasons = []
    for name in _FLASH:
        missing = _missing(name, device, dtype)
        if missing is None:
            log.info("attention: %s on %s", name, device)
            return name
        reasons.append(f"{name}: {missing}")
    log.info("attention: sdpa (%s)", "; ".join(reasons))
    return "sdpa"


def is_flash(attention: str) -> bool:
    """Whether `attention` is one of FlashAttention's implementations."""
    return attention in _FLASH


def causal_mask(queries: int, held: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1, 1, queries, held + queries], added to attention scores: 0 where a query may look (what is held, the
    earlier queries, itself), the lowest number elsewhere."""
    lowest = torch.finfo(dtype).min
    return torch.full((queries, held + queries), lowest, dtype=dtype, device=device).triu_(held + 1)[
        None, None
    ]


def _missing(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this FlashAttention cannot run, or None."""
    module, capability, needs = _FLASH[name]
    if device.type != "cuda":
        return f"the device is {device.type}, not cuda"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the dtype is {dtype}, not float16 or bfloat16"
    if torch.cuda.get_device_capability(device) < capability:
        return f"the GPU is older than compute capability {capability[0]}.{capability[1]}"
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    return None if found else f"{module} is not importable (needs {needs})"


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
    """Bidirectional attention within each of the segments that lie one after the other in a single row.

    Equal segments, which images of one size give, become the batch of one SDPA call; unequal ones are padded
    to `max_length_q`. Neither looks at the values of `cu_seq_lens_q`, so nothing waits for the device.

    Args:
        query, key, value: [1, heads, S, head_dim].
        cu_seq_lens_q: int[segments + 1], where the segments begin and end.
        max_length_q: the longest segment.

    Returns:
        [1, S, heads, head_dim], and None for the attention weights.
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
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=valid[:, None, None], scale=scaling, dropout_p=dropout
    )
    token = torch.arange(total, device=query.device)
    segment = torch.searchsorted(cu_seq_lens_q.long(), token, right=True) - 1
    return out[segment, :, token - start[segment, 0]][None], None


def register_segmented_sdpa() -> str:
    """Makes `segmented_sdpa` selectable as a model's attention implementation; returns its name."""
    from transformers import AttentionInterface

    AttentionInterface.register(SEGMENTED_SDPA, segmented_sdpa)
    return SEGMENTED_SDPA
