"""Transformer layers that run whole in C++ (`csrc/transformer.cpp`), for float32 on the CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from covr_fast import _C
from covr_fast.border import address

from .attend import Heads, Held, signed
from .layers import GatedMlp, LayerModules, Norm, Projection

_LANES = 16  # of csrc/lanes.h: it divides the dimension of heads
_NO_NORM = _C.Norm(0, 0.0)


class CppLayer:
    """A layer with the present weights of its modules. Ask `cpp_layer` for one."""

    def __init__(self, norms: Sequence[Norm], products: Sequence[Projection], heads: Heads) -> None:
        self._parts = norms, products  # C++ has the addresses of their weights
        entry, mlp, *of_heads = (norm.cpp for norm in norms)
        query, key = of_heads or (_NO_NORM, _NO_NORM)
        qkv, out, gate_up, down = (product.cpp for product in products)
        self._layer = _C.Layer(
            **{"input": entry, "query": query, "key": key, "mlp": mlp},
            **{"qkv": qkv, "out": out, "gate_up": gate_up, "down": down},
            **heads._asdict(),
        )

    def decode(self, x: Tensor, held: Held, cos: Tensor, sin: Tensor, begin: int, first: int) -> Tensor:
        """Causal attention: see `TorchLayers`. The sign of `sin` is as `signed` makes it."""
        x = x.contiguous()
        batch, count, width = x.shape
        out = x.new_empty(batch, count - first, width) if first else x
        prefix, length = held.prefix or held, held.prefix_length
        self._layer.decode(
            *(address(tensor, torch.float32) for tensor in (out, x, cos, sin)),
            *(address(tensor, torch.float32) for tensor in (prefix.keys.mT, prefix.values)),
            *(address(tensor, torch.float32) for tensor in (held.keys.mT, held.values)),
            *(prefix.values.shape[2], held.values.shape[2], length),
            *(batch, count, first, begin - length, torch.get_num_threads()),
        )
        return out

    def encode(self, x: Tensor, segment: int, cos: Tensor, sin: Tensor) -> None:
        """Replaces contiguous `x`, float32[B, T, D]: its positions see all of their own segment.

        Args:
            segment: positions of one, a divisor of T.
            cos, sin: [T, dim], the angles of every position; the sign of `sin` as `signed` makes it.
        """
        batch, count, _ = x.shape
        addresses = (address(tensor, torch.float32) for tensor in (x, cos, sin))
        self._layer.encode(*addresses, segment, batch, count, torch.get_num_threads())


def cpp_layer(modules: LayerModules, heads: Heads) -> CppLayer | None:
    """The layer in C++, or None where it cannot run there.

    That is on another device or in another dtype, with quantized weights, an activation other than SiLU, or
    heads whose dimension 16 does not divide.
    """
    mlp = GatedMlp(modules.mlp)
    norms = [Norm(module) for module in (modules.input_norm, modules.mlp_norm, *(modules.head_norms or ()))]
    products = [Projection(*modules.qkv), Projection(modules.out), mlp.gate_up, mlp.down]
    fits = mlp.silu and heads.dim % _LANES == 0
    if not fits or any(x.cpp is None for x in norms) or any(x.cpp is None for x in products):
        return None
    return CppLayer(norms, products, heads)


class CppLayers:
    """A language model's layers: what `torch_layers.TorchLayers` is in torch. Ask `cpp_layers` for them."""

    def __init__(self, layers: list[CppLayer], heads: Heads, cos: Tensor, sin: Tensor) -> None:
        self._layers = layers
        self._heads = heads
        self._cos, self._sin = cos.contiguous(), signed(sin)

    def __len__(self) -> int:
        return len(self._layers)

    def hold(self, batch: int, capacity: int, like: Tensor, prefix: Held | None, length: int) -> Held:
        """Keys lie transposed in memory, so that the scores of neighbouring ones are computed together. The
        prefix is not copied: rows that are computed together load it once."""
        kv, dim = self._heads.kv, self._heads.dim
        whole = -(-(capacity - length) // _LANES) * _LANES
        keys = like.new_zeros(batch, kv, dim, whole).transpose(2, 3)
        return Held(keys, like.new_zeros(batch, kv, whole, dim), prefix, length)

    def __call__(self, i: int, x: Tensor, held: Held, begin: int, first: int) -> Tensor:
        return self._layers[i].decode(x, held, self._cos, self._sin, begin, first)


def cpp_layers(modules: Sequence[LayerModules], heads: Heads, cos: Tensor, sin: Tensor) -> CppLayers | None:
    """All layers of a language model in C++, or None where one cannot run there.

    Args:
        cos, sin: [T, dim], the angles of every position.
    """
    layers: list[CppLayer] = []
    for of_layer in modules:
        layer = cpp_layer(of_layer, heads)
        if layer is None:
            return None
        layers.append(layer)
    return CppLayers(layers, heads, cos, sin)
