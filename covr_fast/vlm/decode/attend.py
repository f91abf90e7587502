"""Attention as it serves, by torch: rotary positions and a fixed cache of keys and values."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Heads(NamedTuple):
    """How a layer's projections divide into heads: `kv * groups` of queries, `kv` of keys, `kv` of values."""

    kv: int
    groups: int
    """Query heads that share a head of keys and values."""
    dim: int
    """Of a head."""
    scale: float
    """Factor of the attention scores."""

    @property
    def queries(self) -> int:
        return self.kv * self.groups


class Held(NamedTuple):
    """The cache of one layer: keys and values, each [B, kv, capacity, dim]."""

    keys: Tensor
    values: Tensor
    prefix: "Held | None" = None
    """With B = 1: what stands before them in every row, if it is not in their own cache."""
    prefix_length: int = 0


class TorchAttention:
    """Causal attention by torch's SDPA.

    Args:
        cos, sin: [T, dim], the angles of every position.
    """

    def __init__(self, heads: Heads, cos: Tensor, sin: Tensor) -> None:
        self._heads = heads
        self._cos, self._sin = cos, signed(sin)
        self._masks: dict[tuple[int, int], Tensor] = {}

    def __call__(self, qkv: Tensor, held: Held, begin: int, first: int) -> Tensor:
        """Attention [B, n - first, kv * groups * dim] of the positions from `first` on.

        Args:
            qkv: [B, n, (groups + 2) * kv * dim], of positions that stand behind `begin` held ones. Their keys
                and values, rotated, go to `held`.
        """
        batch, count, _ = qkv.shape
        kv, groups, dim, scale = self._heads
        queries, end = self._heads.queries, begin + count
        heads = qkv.view(batch, count, -1, dim).transpose(1, 2)
        rotated = _rotate(heads[:, : queries + kv], self._cos[begin:end], self._sin[begin:end])
        held.keys[:, :, begin:end] = rotated[:, queries:]
        held.values[:, :, begin:end] = heads[:, queries + kv :]
        # Heads that share keys become further queries of one head, so keys need not be repeated.
        count -= first
        q = rotated[:, :queries, first:].reshape(batch, kv, groups * count, dim)
        mask = self._mask(count, end - count, qkv)
        out = F.scaled_dot_product_attention(
            q, held.keys[:, :, :end], held.values[:, :, :end], attn_mask=mask, scale=scale
        )
        return out.view(batch, queries, count, -1).transpose(1, 2).reshape(batch, count, -1)

    def _mask(self, count: int, before: int, like: Tensor) -> Tensor | None:
        """What the queries may look at; None where that is everything."""
        if count == 1:
            return None
        key = (count, before)
        if key not in self._masks:
            lowest = torch.finfo(like.dtype).min
            mask = like.new_full((count, before + count), lowest).triu_(before + 1)
            self._masks[key] = mask.repeat(self._heads.groups, 1)[None, None]
        return self._masks[key]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of [B, heads, n, dim]; `sin` carries the sign of the half that it multiplies."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def signed(sin: Tensor) -> Tensor:
    """Sines [..., dim] that carry the sign with which the halves of a head change places."""
    first, second = sin.chunk(2, -1)
    return torch.cat((-first, second), -1)
