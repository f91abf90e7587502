"""A language model's layers as torch operations: for any dtype and device, and quantized weights."""

from collections.abc import Sequence

from torch import Tensor

from .attend import Heads, Held, TorchAttention
from .layers import GatedMlp, LayerModules, Norm, Projection


class _Layer:
    def __init__(self, modules: LayerModules) -> None:
        self.input_norm, self.mlp_norm = Norm(modules.input_norm), Norm(modules.mlp_norm)
        self.qkv, self.out = Projection(*modules.qkv), Projection(modules.out)
        self.head_norms = [Norm(module) for module in modules.head_norms or ()]
        self.mlp = GatedMlp(modules.mlp)


class TorchLayers:
    """The layers with their present weights.

    Args:
        cos, sin: [T, dim], the angles of every position.
    """

    def __init__(self, modules: Sequence[LayerModules], heads: Heads, cos: Tensor, sin: Tensor) -> None:
        self._layers = [_Layer(of_layer) for of_layer in modules]
        self._heads = heads
        self._attend = TorchAttention(heads, cos, sin)

    def __len__(self) -> int:
        return len(self._layers)

    def hold(self, batch: int, capacity: int, like: Tensor, prefix: Held | None, length: int) -> Held:
        """A layer's cache of the dtype and device of `like` for `capacity` positions in all.

        Its first `length` ones hold, or refer to, those of `prefix`, a cache with batch 1 (None: 0).
        """
        shape = (batch, self._heads.kv, capacity, self._heads.dim)
        held = Held(like.new_zeros(shape), like.new_zeros(shape))
        if prefix is not None:
            held.keys[:, :, :length] = prefix.keys[:, :, :length]
            held.values[:, :, :length] = prefix.values[:, :, :length]
        return held

    def __call__(self, i: int, x: Tensor, held: Held, begin: int, first: int) -> Tensor:
        """What layer `i` makes of contiguous `x` [B, n, D], from its position `first` on: [B, n - first, D].

        The positions stand behind `begin` ones that are held; their keys and values go to `held`. `x` may be
        overwritten.
        """
        layer = self._layers[i]
        qkv = layer.qkv(layer.input_norm(x))
        if layer.head_norms:
            self._norm_heads(qkv, *layer.head_norms)
        attended = self._attend(qkv, held, begin, first)
        x = x[:, first:].contiguous()
        layer.out.add_to(x, attended)
        layer.mlp.add_to(x, layer.mlp_norm(x))
        return x

    def _norm_heads(self, qkv: Tensor, query_norm: Norm, key_norm: Norm) -> None:
        """Norms the heads of queries and keys in place."""
        queries, kv = self._heads.queries, self._heads.kv
        heads = qkv.view(*qkv.shape[:2], -1, self._heads.dim)
        heads[:, :, :queries] = query_norm(heads[:, :, :queries])
        heads[:, :, queries : queries + kv] = key_norm(heads[:, :, queries : queries + kv])
