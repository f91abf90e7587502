"""The rows of a training batch on their way through the language model: padded or packed.

A *row* is the token sequence of one sample: image, end of the prompt, answer. All rows of a batch follow the
same *prefix*, the prompt's text before the image, whose keys and values are computed once per batch.

A decoder treats tokens one by one, except in attention. So rows of different lengths are either *padded* to
one length, or *packed*: joined, without padding, to one long row. FlashAttention accepts packed rows; for
torch's SDPA they are padded for the attention alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ...streams import send
from .attention import causal_mask, is_flash

PACKED_SDPA = "covr_packed_sdpa"
"""`packed_sdpa` in transformers' registry."""

KeysValues = tuple[Tensor, Tensor]
Prefix = list[KeysValues]
"""Per layer the keys and values [1, heads, P, head_dim] of the prefix."""


# ---- how rows lie in the tensors ----


class Padded:
    """Rows of one length, [B, width], all after the same prefix of `prefix_length` tokens."""

    def __init__(self, rows: int, width: int, prefix_length: int) -> None:
        self._shape = (rows, width)
        self._prefix_length = prefix_length

    def packed(self, x: Tensor) -> Tensor:
        """Padded [B, width, ...] -> as the decoder takes it."""
        return x

    def padded(self, x: Tensor) -> Tensor:
        """The inverse of `packed`. Values after the end of a row are arbitrary."""
        return x

    def positions(self, ids: Tensor) -> Tensor:
        """Position ids [..., 1, width], the same for every row, as the decoder takes them."""
        return ids.expand(*ids.shape[:-2], self._shape[0], -1)

    def after(self, prefix: Tensor, own: Tensor) -> Tensor:
        """Keys or values of every row (`own`, as the decoder takes them) after those of the prefix
        [1, heads, prefix_length, head_dim], as the attention takes them."""
        return torch.cat((prefix.expand(self._shape[0], -1, -1, -1), own), 2)

    def attention(self, like: Tensor) -> dict[str, Any]:
        """The decoder's arguments for its attention, for keys of the dtype and device of `like`."""
        return {"attention_mask": causal_mask(self._shape[1], self._prefix_length, like.dtype, like.device)}


class Packed(Padded):
    """Rows of `lengths` int64[B] (on the host) packed into one, [1, total, ...], for `packed_sdpa`."""

    def __init__(self, lengths: Tensor, width: int, prefix_length: int, device: torch.device) -> None:
        super().__init__(len(lengths), width, prefix_length)
        self._places = send(_places(lengths, width), device)
        source = torch.arange(width).minimum(lengths[:, None] - 1) + (lengths.cumsum(0) - lengths)[:, None]
        self._sources = send(source.flatten(), device)

    def packed(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, self._places)[None]

    def padded(self, x: Tensor) -> Tensor:
        """After the end of a row its last token is repeated; no gradient comes from there."""
        pad: Callable[..., Tensor] = _Pad.apply
        return pad(x[0], self._sources, self._places).view(*self._shape, *x.shape[2:])

    def padded_heads(self, x: Tensor) -> Tensor:
        """[1, heads, total, head_dim] -> [B, heads, width, head_dim]; what `after` returned is so already."""
        if (x.shape[0], x.shape[2]) != (1, len(self._places)):
            return x
        return self.padded(x.transpose(1, 2)).transpose(1, 2)

    def positions(self, ids: Tensor) -> Tensor:
        return ids[..., self._places % self._shape[1]]

    def after(self, prefix: Tensor, own: Tensor) -> Tensor:
        return super().after(prefix, self.padded_heads(own))

    def attention(self, like: Tensor) -> dict[str, Any]:
        return super().attention(like) | {"packed": self}


class _Pad(torch.autograd.Function):
    """`x[sources]`, whose elements at `places` are x itself. The others are copies and send no gradient back,
    so backward gathers too; indexing would add the gradients of all copies to zeros, which is slower."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sources: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, sources)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradient.index_select(0, places), None, None


class FlashPacked(Packed):
    """Packed rows for FlashAttention. It takes the bounds of the rows and no mask: where a row has more keys
    than queries, its last query sees all keys, the query before that all but the last, and so on."""

    def __init__(self, lengths: Tensor, width: int, prefix_length: int, device: torch.device) -> None:
        super().__init__(lengths, width, prefix_length, device)
        keys = lengths + prefix_length
        self._key_places = send(_places(keys, prefix_length + width), device)
        bounds = torch.zeros(2, len(lengths) + 1, dtype=torch.int32)
        bounds[0, 1:], bounds[1, 1:] = lengths.cumsum(0), keys.cumsum(0)
        cu_q, cu_k = send(bounds, device)
        self._attention = {
            "attention_mask": None,
            "cu_seq_lens_q": cu_q,
            "cu_seq_lens_k": cu_k,
            "max_length_q": int(lengths.max()),
            "max_length_k": int(keys.max()),
        }

    def after(self, prefix: Tensor, own: Tensor) -> Tensor:
        # Through padded rows: then one sum, in float32 and in a fixed order, adds up the prefix's gradients.
        keys = super().after(prefix, own).transpose(1, 2).flatten(0, 1)
        return keys.index_select(0, self._key_places)[None].transpose(1, 2)

    def attention(self, like: Tensor) -> dict[str, Any]:
        return self._attention


def _places(lengths: Tensor, width: int) -> Tensor:
    """Places int64[total] of the tokens of rows of these lengths in padded rows [B * width]."""
    return (torch.arange(width) < lengths[:, None]).flatten().nonzero()[:, 0]


def arrange(attention: str, lengths: Tensor, width: int, prefix_length: int, device: torch.device) -> Padded:
    """How a decoder with this attention implementation takes rows of these lengths."""
    if is_flash(attention):  # always packed, because it takes no mask
        return FlashPacked(lengths, width, prefix_length, device)
    if attention == PACKED_SDPA and int(lengths.min()) < width:
        return Packed(lengths, width, prefix_length, device)
    return Padded(len(lengths), width, prefix_length)


# ---- the prefix's keys and values ----


class RecordingCache(Cache):
    """A KV cache that records one forward pass from position 0: this makes a `Prefix`."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.prefix: Prefix = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KeysValues:
        self.prefix.append((key_states, value_states))
        return key_states, value_states


class TrainingCache(Cache):
    """A KV cache that puts the prefix before the keys and values of the rows. Gradients reach it.

    Autograd adds up the gradients of all rows, so the sum is that of a prefix repeated in every row.
    """

    def __init__(self, prefix: Prefix, rows: Padded) -> None:
        super().__init__(layers=[])
        self._prefix = prefix
        self._rows = rows

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._prefix[0][0].shape[2]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KeysValues:
        keys, values = self._prefix[layer_idx]
        return self._rows.after(keys, key_states), self._rows.after(values, value_states)


# ---- attention over packed rows ----


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
    """transformers' SDPA. Rows that are `packed` are padded for it and packed again.

    `query` is [1, heads, total, head_dim]; `key` and `value` are like it, or results of `Packed.after`. The
    mask is causal, so that no token sees the padding after its row. Returns [1, total, heads, head_dim].
    """
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query, key, value = (packed.padded_heads(x) for x in (query, key, value))
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return packed.packed(out), None


AttentionInterface.register(PACKED_SDPA, packed_sdpa)


def training_attention(attention: str, packing: str) -> str:
    """The implementation that trains a decoder loaded with `attention`; see `TunerConfig.packing`."""
    remedy = "set packing='auto', or open the prior with attention='sdpa'"
    if packing == "off" and is_flash(attention):
        raise ValueError(
            f"packing='off' is not supported with {attention!r}, which takes no padding: {remedy}"
        )
    if packing == "on" and attention == "eager":
        raise ValueError(f"packing='on' is not supported with 'eager' attention: {remedy}")
    return PACKED_SDPA if attention == "sdpa" and packing != "off" else attention
