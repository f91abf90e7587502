"""How the rows of a micro-batch go through a decoder: padded to one length, or packed into a single row.

A decoder treats tokens one by one, except in its attention. So rows that lie one behind the other need no
padding; FlashAttention takes them as they are, and for torch's SDPA they are padded for the attention alone.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .attention import causal_mask, is_flash

PACKED_SDPA = "covr_packed_sdpa"
"""`packed_sdpa` in transformers' registry."""


class Padded:
    """Rows [B, width] as they come, each behind the same prefix of `held` tokens."""

    def __init__(self, rows: int, width: int, held: int) -> None:
        self._shape = (rows, width)
        self._held = held

    def packed(self, x: Tensor) -> Tensor:
        """[B, width, ...] as the decoder takes it."""
        return x

    def padded(self, x: Tensor) -> Tensor:
        """The inverse of `packed`; what stands behind a row's end means nothing."""
        return x

    def positions(self, ids: Tensor) -> Tensor:
        """Position ids [..., 1, width], the same for every row, as the decoder takes them."""
        return ids.expand(*ids.shape[:-2], self._shape[0], -1)

    def behind(self, prefix: Tensor, own: Tensor) -> Tensor:
        """Keys or values of the prefix and of every row behind it, as the attention takes them.

        Args:
            prefix: [1, heads, held, head_dim].
            own: [B, heads, width, head_dim], or what `packed` makes of it.
        """
        return torch.cat((prefix.expand(self._shape[0], -1, -1, -1), own), 2)

    def attention(self, like: Tensor) -> dict[str, Any]:
        """Arguments of the decoder that its attention needs, for keys of the dtype and device of `like`."""
        return {"attention_mask": causal_mask(self._shape[1], self._held, like.dtype, like.device)}


class Packed(Padded):
    """Rows one behind the other, [1, total, ...], for `packed_sdpa`.

    Args:
        lengths: int64[B] on the host, the tokens of each row, in [1, width].
    """

    def __init__(self, lengths: Tensor, width: int, held: int, device: torch.device) -> None:
        super().__init__(len(lengths), width, held)
        self._places = _valid(lengths, width).to(device, non_blocking=True)
        source = torch.arange(width).minimum(lengths[:, None] - 1) + (lengths.cumsum(0) - lengths)[:, None]
        self._sources = source.flatten().to(device, non_blocking=True)

    def packed(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, self._places)[None]

    def padded(self, x: Tensor) -> Tensor:
        """What stands behind a row's end repeats its last token, and no gradient comes from there."""
        return _Spread.apply(x[0], self._sources, self._places).unflatten(0, self._shape)

    def padded_heads(self, x: Tensor) -> Tensor:
        """[1, heads, total, head_dim] -> [B, heads, width, head_dim]; what `behind` returned stays so."""
        if (x.shape[0], x.shape[2]) != (1, len(self._places)):
            return x
        return self.padded(x.transpose(1, 2)).transpose(1, 2)

    def positions(self, ids: Tensor) -> Tensor:
        return ids[..., self._places % self._shape[1]]

    def behind(self, prefix: Tensor, own: Tensor) -> Tensor:
        return super().behind(prefix, self.padded_heads(own))

    def attention(self, like: Tensor) -> dict[str, Any]:
        return super().attention(like) | {"packed": self}


class _Spread(torch.autograd.Function):
    """Copies `x[sources]`; of the copies, those at `places`, one of each, receive the gradients. So these are
    gathered too, where indexing would add the gradients of all copies to zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sources: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, sources)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradient.index_select(0, places), None, None


class FlashPacked(Packed):
    """The same for FlashAttention, which is told where rows begin and needs no mask: where a row has more
    keys than queries, its last query sees all of them, the one before it all but the last, and so on."""

    def __init__(self, lengths: Tensor, width: int, held: int, device: torch.device) -> None:
        super().__init__(lengths, width, held, device)
        self._key_places = _valid(lengths + held, held + width).to(device, non_blocking=True)
        bounds = torch.zeros(2, len(lengths) + 1, dtype=torch.int32)
        bounds[0, 1:] = lengths.cumsum(0)
        bounds[1, 1:] = (lengths + held).cumsum(0)
        cu_q, cu_k = bounds.to(device, non_blocking=True)
        longest = int(lengths.max())
        self._attention = {
            "attention_mask": None,
            "cu_seq_lens_q": cu_q,
            "cu_seq_lens_k": cu_k,
            "max_length_q": longest,
            "max_length_k": held + longest,
        }

    def behind(self, prefix: Tensor, own: Tensor) -> Tensor:
        # By way of padded rows: then one sum reduces the prefix's gradients, in float32 and in a fixed order.
        keys = super().behind(prefix, own).transpose(1, 2).flatten(0, 1)
        return keys.index_select(0, self._key_places)[None].transpose(1, 2)

    def attention(self, like: Tensor) -> dict[str, Any]:
        return self._attention


def _valid(lengths: Tensor, width: int) -> Tensor:
    """Places int64[total] of the tokens in rows of these lengths, padded to [B, width]."""
    return (torch.arange(width) < lengths[:, None]).flatten().nonzero()[:, 0]


def arrange(attention: str, lengths: Tensor, width: int, held: int, device: torch.device) -> Padded:
    """How a decoder of this attention implementation takes rows of these lengths.

    With FlashAttention always packed, since it takes no mask; with SDPA only where there is padding to save.
    """
    if is_flash(attention):
        return FlashPacked(lengths, width, held, device)
    if attention == PACKED_SDPA and int(lengths.min()) < width:
        return Packed(lengths, width, held, device)
    return Padded(len(lengths), width, held)


def packed_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Packed | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA; with `packed`, of rows that are packed, by the mask of those rows padded.

    Args:
        query: [1, heads, total, head_dim].
        key, value: [1, kv_heads, total, head_dim], or what `Packed.behind` made of them.
        attention_mask: [1, 1, width, held + width]: causal, so that no token sees the padding behind its row.

    Returns:
        [1, total, heads, head_dim], and None for the attention weights.
    """
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query, key, value = (packed.padded_heads(x) for x in (query, key, value))
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return packed.packed(out), None


def training_attention(attention: str, packing: str) -> str:
    """The implementation with which a decoder loaded with `attention` is trained; see `TunerConfig.packing`.

    Raises:
        ValueError: this attention cannot do what is asked for.
    """
    remedy = "set packing='auto', or open the prior with attention='sdpa'"
    if packing == "off" and is_flash(attention):
        raise ValueError(f"packing='off' cannot be had with {attention!r}, which takes no padding: {remedy}")
    if packing == "on" and attention == "eager":
        raise ValueError(f"packing='on' cannot be had with 'eager' attention: {remedy}")
    if packing == "off" or attention != "sdpa":
        return attention
    AttentionInterface.register(PACKED_SDPA, packed_sdpa)
    return PACKED_SDPA
