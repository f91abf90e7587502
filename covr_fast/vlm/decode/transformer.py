"""The language model as it serves: merged weights, a fixed cache, and as few operations as it takes.

Every supported backbone has the same decoder: RMS norm, attention with rotary positions, RMS norm, gated
MLP. Running it here instead of through transformers' modules merges LoRA adapters into the weights, makes
one product of the query, key and value projections and one of the gate and up projections, and prepares
positions and masks beforehand. Layers of other adapters are called as the modules they are. The results are
those of the modules; tests compare them on every backbone.

The merged weights are a second copy of the decoder's (5.5 GB for Qwen2.5-VL-3B in bfloat16), refreshed when
weights are published.
"""

from typing import Any

import torch
from torch import Tensor

from ..model.adapters import bare, wrapped
from ..model.backbones import Backbone, ImageFeatures
from .attend import Heads, Held
from .cpp_layers import cpp_layers
from .layers import LayerModules, Norm
from .torch_layers import TorchLayers


class KeyValueCache:
    """Preallocated keys and values of every layer, of which the first `length` positions are in use.

    Writes go to fixed places and reads are views: nothing is allocated or copied while decoding.
    """

    def __init__(self, layers: list[Held], length: int) -> None:
        self.layers = layers
        self.length = length


class ServingDecoder:
    """The decoder of `backbone` with its present weights.

    Args:
        positions: position ids [..., 1, T] of everything that will be decoded; the same in every row.
    """

    def __init__(self, backbone: Backbone, positions: Tensor) -> None:
        decoder: Any = backbone.decoder
        if any(kind != "full_attention" for kind in getattr(decoder.config, "layer_types", None) or ()):
            raise ValueError("decoders with sliding-window layers are not supported")
        attention = bare(bare(decoder.layers[0]).self_attn)
        kv = decoder.config.num_key_value_heads
        heads = Heads(kv, attention.num_key_value_groups, attention.head_dim, attention.scaling)
        modules = [_modules(layer) for layer in decoder.layers]
        self._norm = Norm(decoder.norm)
        self._like = torch.empty(0, dtype=backbone.dtype, device=backbone.device)
        cos, sin = (x[0] for x in decoder.rotary_emb(self._like.new_zeros(1, 1, 1), positions))
        self._layers = cpp_layers(modules, heads, cos, sin) or TorchLayers(modules, heads, cos, sin)

    def cache(self, batch: int, capacity: int, prefix: KeyValueCache | None = None) -> KeyValueCache:
        """A cache for `batch` rows of `capacity` positions that begins with `prefix`, a cache of one row."""
        length = 0 if prefix is None else prefix.length
        shared = [None] * len(self._layers) if prefix is None else prefix.layers
        layers = [self._layers.hold(batch, capacity, self._like, held, length) for held in shared]
        return KeyValueCache(layers, length)

    def __call__(
        self,
        x: Tensor,
        cache: KeyValueCache,
        *,
        image_at: Tensor | None = None,
        image: ImageFeatures | None = None,
    ) -> Tensor:
        """The hidden state [B, D] after the last of embeddings `x` [B, n, D] behind what `cache` holds.

        The cache grows by n. The last layer attends and computes for the last position only. Without an image
        `x` is overwritten.
        """
        begin, count = cache.length, x.shape[1]
        cache.length = begin + count
        if image_at is not None and image is not None:
            x = x.index_copy(1, image_at, image.tokens.to(x.dtype))
        for i, held in enumerate(cache.layers):
            first = count - 1 if i + 1 == len(self._layers) else 0
            x = self._layers(i, x, held, begin, first)
            if image_at is not None and image is not None and i < len(image.deep):
                x.index_add_(1, image_at, image.deep[i].to(x.dtype))
        return self._norm(x[:, -1])


def _modules(layer: Any) -> LayerModules:
    layer = bare(layer)
    attention, mlp = bare(layer.self_attn), bare(layer.mlp)
    for part in (layer, attention, mlp):
        if wrapped(part):
            raise ValueError(f"an adapter replaces a whole {type(part).__name__}, which cannot be served")
    return LayerModules(
        input_norm=layer.input_layernorm,
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        out=attention.o_proj,
        mlp_norm=layer.post_attention_layernorm,
        mlp=mlp,
        head_norms=(attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None,
    )
