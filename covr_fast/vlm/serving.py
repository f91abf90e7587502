"""The language model as it serves: merged weights, a fixed cache, and as few operations as it takes.

Every supported backbone has the same decoder: RMS norm, attention with rotary positions, RMS norm, gated
MLP. Running it here instead of through transformers' modules merges LoRA adapters into the weights, makes
one product of the query, key and value projections and one of the gate and up projections, and prepares
positions and masks beforehand. The results are those of the modules; tests compare them on every backbone.

The merged weights are a second copy of the decoder's (5.5 GB for Qwen2.5-VL-3B in bfloat16), refreshed when
weights are published.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbones import Backbone, ImageFeatures

TensorMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Layer:
    input_norm: TensorMap
    qkv: TensorMap
    head_norms: tuple[TensorMap, TensorMap] | None
    out: TensorMap
    mlp_norm: TensorMap
    gate_up: TensorMap
    activation: Callable[[Tensor], Tensor]
    down: TensorMap


class KeyValueCache:
    """Preallocated keys and values [B, heads, capacity, head_dim] per layer, beginning with a shared prefix.

    Writes go to fixed places and reads are views: nothing is allocated or copied while decoding.
    """

    def __init__(self, layers: int, batch: int, heads: int, capacity: int, dim: int, like: Tensor) -> None:
        self.layers = [like.new_zeros(2, batch, heads, capacity, dim) for _ in range(layers)]
        self.length = 0

    def begin_with(self, prefix: "KeyValueCache") -> None:
        """Copies the prefix, held with batch 1, into every row."""
        self.length = prefix.length
        for own, shared in zip(self.layers, prefix.layers, strict=True):
            own[:, :, :, : self.length] = shared[:, :, :, : self.length]


class ServingDecoder:
    """The decoder of `backbone` with its present weights.

    Args:
        positions: position ids [..., 1, T] of everything that will be decoded; the same in every row.
    """

    def __init__(self, backbone: Backbone, positions: Tensor) -> None:
        decoder: Any = backbone.decoder
        if any(kind != "full_attention" for kind in getattr(decoder.config, "layer_types", None) or ()):
            raise ValueError("decoders with sliding-window layers are not supported")
        attention = decoder.layers[0].self_attn
        self._dim: int = attention.head_dim
        self._scale: float = attention.scaling
        self._groups: int = attention.num_key_value_groups
        self._kv_heads: int = decoder.config.num_key_value_heads
        self._layers = [self._prepare(layer) for layer in decoder.layers]
        self._norm = decoder.norm
        self._like = backbone.head.weight
        cos, sin = decoder.rotary_emb(self._like.new_zeros(1, 1, 1), positions)
        self._cos, self._sin = cos[:, None], _signed_for_rotation(sin)[:, None]
        self._masks: dict[tuple[int, int], Tensor] = {}

    def cache(self, batch: int, capacity: int) -> KeyValueCache:
        return KeyValueCache(len(self._layers), batch, self._kv_heads, capacity, self._dim, self._like)

    def __call__(
        self,
        x: Tensor,
        cache: KeyValueCache,
        *,
        image_at: Tensor | None = None,
        image: ImageFeatures | None = None,
    ) -> Tensor:
        """The hidden state [B, D] after the last of embeddings `x` [B, n, D] behind what `cache` holds.

        The cache grows by n. The last layer attends and computes for the last position only.
        """
        begin, count = cache.length, x.shape[1]
        end = cache.length = begin + count
        cos, sin = self._cos[:, :, begin:end], self._sin[:, :, begin:end]
        if image_at is not None and image is not None:
            x = x.index_copy(1, image_at, image.tokens.to(x.dtype))
        for i, layer in enumerate(self._layers):
            first = count - 1 if i + 1 == len(self._layers) else 0
            attended = self._attend(layer, layer.input_norm(x), cache.layers[i], begin, first, cos, sin)
            x = x[:, first:] + attended
            gate, up = layer.gate_up(layer.mlp_norm(x)).chunk(2, -1)
            x = x + layer.down(layer.activation(gate) * up)
            if image_at is not None and image is not None and i < len(image.deep):
                x = x.index_add(1, image_at, image.deep[i].to(x.dtype))
        return self._norm(x[:, -1])

    def _attend(
        self, layer: _Layer, x: Tensor, held: Tensor, begin: int, first: int, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Attention output of the positions from `first` on; the keys and values of all go to `held`."""
        batch, count, _ = x.shape
        kv, groups = self._kv_heads, self._groups
        qkv = layer.qkv(x).view(batch, count, -1, self._dim).transpose(1, 2)
        queries = kv * groups
        if layer.head_norms is None:
            rotated = _rotate(qkv[:, : queries + kv], cos, sin)
            q, k = rotated[:, :queries], rotated[:, queries:]
        else:
            q = _rotate(layer.head_norms[0](qkv[:, :queries]), cos, sin)
            k = _rotate(layer.head_norms[1](qkv[:, queries : queries + kv]), cos, sin)
        end = begin + count
        held[0, :, :, begin:end] = k
        held[1, :, :, begin:end] = qkv[:, queries + kv :]
        # Heads that share keys become further queries of one head, so keys need not be repeated.
        count -= first
        q = q[:, :, first:].reshape(batch, kv, groups * count, self._dim)
        mask = self._mask(count, end - count)
        out = F.scaled_dot_product_attention(
            q, held[0, :, :, :end], held[1, :, :, :end], attn_mask=mask, scale=self._scale
        )
        return layer.out(out.view(batch, queries, count, -1).transpose(1, 2).reshape(batch, count, -1))

    def _mask(self, count: int, held: int) -> Tensor | None:
        """What the queries may look at; None where that is everything."""
        if count == 1:
            return None
        key = (count, held)
        if key not in self._masks:
            lowest = torch.finfo(self._like.dtype).min
            mask = self._like.new_full((count, held + count), lowest).triu_(held + 1)
            self._masks[key] = mask.repeat(self._groups, 1)[None, None]
        return self._masks[key]

    @staticmethod
    def _prepare(layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        head_norms = None
        if hasattr(attention, "q_norm"):
            head_norms = (_norm(attention.q_norm), _norm(attention.k_norm))
        return _Layer(
            input_norm=_norm(layer.input_layernorm),
            qkv=_merged(attention.q_proj, attention.k_proj, attention.v_proj),
            head_norms=head_norms,
            out=_merged(attention.o_proj),
            mlp_norm=_norm(layer.post_attention_layernorm),
            gate_up=_merged(mlp.gate_proj, mlp.up_proj),
            activation=mlp.act_fn,
            down=_merged(mlp.down_proj),
        )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of [B, heads, n, d]; `sin` carries the sign of the half that it multiplies."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _signed_for_rotation(sin: Tensor) -> Tensor:
    first, second = sin.chunk(2, -1)
    return torch.cat((-first, second), -1)


def _norm(module: Any) -> TensorMap:
    weight, epsilon = module.weight, module.variance_epsilon
    return lambda x: F.rms_norm(x, weight.shape, weight, epsilon)


def _merged(*modules: nn.Module) -> TensorMap:
    """One product for several projections of the same input; quantised ones are called one by one."""
    parts = [_plain(module) for module in modules]
    if any(part is None for part in parts):
        return lambda x: torch.cat([module(x) for module in modules], -1)
    weights, biases = zip(*[part for part in parts if part is not None], strict=True)
    weight = torch.cat(weights)
    bias = None if biases[0] is None else torch.cat(biases)
    return lambda x: F.linear(x, weight, bias)


def _plain(module: Any) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear layer, LoRA merged in; None if its weight is not a plain matrix."""
    adapted = hasattr(module, "get_delta_weight")
    base = module.get_base_layer() if adapted else module
    if type(base) is not nn.Linear:
        return None
    weight = base.weight
    if adapted:
        for adapter in module.active_adapters:
            weight = weight + module.get_delta_weight(adapter).to(weight.dtype)
    return weight, base.bias
