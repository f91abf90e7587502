"""Attention of tokens that form a tree instead of a line."""

import torch
from torch import Tensor

from .transformer import Attention, LayerCache, attend, rotate


class TreeAttention(Attention):
    """Attention of the nodes of a tree that hangs from positions in a cache.

    Several nodes may have the same position, and each sees what it is told. Nothing is written to the cache,
    so other trees may hang from the same positions.

    Args:
        attention: that of the positions.
        positions: int64[B, n], of the nodes.
        visible: bool[B, n, past + n], which positions of the cache, and which nodes, each node sees.
    """

    def __init__(self, attention: Attention, positions: Tensor, visible: Tensor) -> None:
        self.heads = attention.heads
        self.cos = attention.cos[positions][:, None]
        self.signed_sin = attention.signed_sin[positions][:, None]
        mask = self.cos.new_zeros(visible.shape).masked_fill_(~visible, torch.finfo(self.cos.dtype).min)
        self._tree_mask = mask[:, None].repeat(1, 1, self.heads.groups, 1)

    def __call__(self, qkv: Tensor, cache: LayerCache, past: int, skip: int) -> Tensor:
        """[B, n, kv * groups * dim], of all nodes: `skip` is 0. Else see `Attention`."""
        kv, groups, dim, _ = self.heads
        queries = kv * groups
        heads = qkv.unflatten(-1, (-1, dim)).transpose(1, 2)
        rotated = rotate(heads[:, : queries + kv], self.cos, self.signed_sin)
        keys = torch.cat((cache.keys[:, :, :past], rotated[:, queries:]), 2)
        values = torch.cat((cache.values[:, :, :past], heads[:, queries + kv :]), 2)
        return attend(self.heads, rotated[:, :queries], keys, values, self._tree_mask)
