"""Attention as it serves: rotary positions, and for the language model a fixed cache of keys and values.

That has two implementations: `CppAttention` for float32 on the CPU, `TorchAttention` for all else.
`SegmentAttention` is a vision tower's, for float32 on the CPU only.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from covr_fast.ops._backend import launch

from .layers import in_cpp


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
        self._cos, self._sin = cos, _signed(sin)
        self._masks: dict[tuple[int, int], Tensor] = {}

    def hold(self, batch: int, capacity: int, like: Tensor, prefix: Held | None, length: int) -> Held:
        """A cache of the dtype and device of `like` for `capacity` positions in all.

        Its first `length` ones hold, or refer to, those of `prefix`, a cache with batch 1 (None: 0).
        """
        shape = (batch, self._heads.kv, capacity, self._heads.dim)
        held = Held(like.new_zeros(shape), like.new_zeros(shape))
        if prefix is not None:
            held.keys[:, :, :length] = prefix.keys[:, :, :length]
            held.values[:, :, :length] = prefix.values[:, :, :length]
        return held

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


class CppAttention:
    """The same in one pass of C++ over each head, for head dimensions of which 16 is a divisor."""

    LANES = 16

    def __init__(self, heads: Heads, cos: Tensor, sin: Tensor) -> None:
        self._heads = heads
        self._cos, self._sin = cos.contiguous(), _signed(sin)

    @classmethod
    def takes(cls, heads: Heads, like: Tensor) -> bool:
        return in_cpp(like) and heads.dim % cls.LANES == 0

    def hold(self, batch: int, capacity: int, like: Tensor, prefix: Held | None, length: int) -> Held:
        """Keys lie transposed in memory, so that the scores of neighbouring ones are computed together. The
        prefix is not copied: rows that are computed together load it once."""
        kv, dim = self._heads.kv, self._heads.dim
        whole = -(-(capacity - length) // self.LANES) * self.LANES
        keys = like.new_zeros(batch, kv, dim, whole).transpose(2, 3)
        return Held(keys, like.new_zeros(batch, kv, whole, dim), prefix, length)

    def __call__(self, qkv: Tensor, held: Held, begin: int, first: int) -> Tensor:
        batch, count, _ = qkv.shape
        kv, groups, dim, scale = self._heads
        out = qkv.new_empty(batch, count - first, self._heads.queries * dim)
        angles = slice(begin, begin + count)
        prefix, length = held.prefix or held, held.prefix_length
        launch(
            "attend",
            *(out, qkv, self._cos[angles], self._sin[angles]),
            *(prefix.keys, prefix.values, held.keys, held.values),
            *(prefix.values.shape[2], held.values.shape[2], length),
            *(batch, count, first, begin - length, kv, groups, dim),
            *(scale, torch.get_num_threads()),
        )
        return out


class SegmentAttention:
    """Attention within equal segments, whose positions see all of their own, in C++ and without a cache.

    Args:
        heads: of queries, as of keys and values.
        dim: of a head; 16 divides it.
        scale: factor of the attention scores.
        cos, sin: float32[T, dim], the angles of an image's positions.
    """

    def __init__(self, heads: int, dim: int, scale: float, cos: Tensor, sin: Tensor) -> None:
        self._heads, self._dim, self._scale = heads, dim, scale
        self._cos, self._sin = cos.contiguous(), _signed(sin)

    @classmethod
    def takes(cls, dim: int, like: Tensor) -> bool:
        return in_cpp(like) and dim % CppAttention.LANES == 0

    def __call__(self, qkv: Tensor, segment: int) -> Tensor:
        """Attention float32[B, T, heads * dim] of the images `qkv`, float32[B, T, 3 * heads * dim].

        Args:
            segment: positions of one, a divisor of T.
        """
        batch, count, _ = qkv.shape
        out = qkv.new_empty(batch, count, self._heads * self._dim)
        periods = count // segment
        launch(
            "attend_segments",
            *(out, qkv, self._cos, self._sin),
            *(batch * periods, segment, periods, self._heads, self._dim),
            *(self._scale, torch.get_num_threads()),
        )
        return out


def make_attention(heads: Heads, cos: Tensor, sin: Tensor, like: Tensor) -> TorchAttention | CppAttention:
    """Causal attention over a cache for activations like `like`."""
    kind = CppAttention if CppAttention.takes(heads, like) else TorchAttention
    return kind(heads, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of [B, heads, n, dim]; `sin` carries the sign of the half that it multiplies."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _signed(sin: Tensor) -> Tensor:
    first, second = sin.chunk(2, -1)
    return torch.cat((-first, second), -1)
