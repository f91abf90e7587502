"""The language model that writes the answers: joined weights, fixed caches, few operations.

The language models of all supported backbones have the same layers: RMS norm, attention with rotary
positions, RMS norm, gated MLP. This file runs them without transformers' modules. It joins the projections
of one input into one product, merges LoRA adapters into the weights or keeps them beside (see `projection`),
and prepares rotary angles and masks once. A part with another adapter is called as the module that it is.
Tests compare the hidden states with those of transformers on every backbone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.adapters import bare, loses_too_much, lost_by_merging, untouched, wrapped
from ..model.attention import causal_mask
from ..model.backbones import Backbone, ImageFeatures
from .projection import projection


class Heads(NamedTuple):
    """The attention heads of a layer: `kv * groups` of queries, `kv` of keys, `kv` of values."""

    kv: int
    groups: int
    """Query heads that share one head of keys and values."""
    dim: int
    """Numbers in a head."""
    scale: float
    """Factor of the attention scores."""


class LayerCache(NamedTuple):
    """Keys and values of one layer, each [B, kv, capacity, dim]."""

    keys: Tensor
    values: Tensor


@dataclass
class KeyValueCache:
    """Keys and values of all layers; the first `length` positions are in use.

    They are allocated once. Writes go to fixed places and reads are views, so decoding copies none of them.
    """

    layers: list[LayerCache]
    length: int


class Transformer:
    """The language model of a backbone, with the weights that it has now.

    Joined weights, into which LoRA is merged, are a second copy of the model's: 5.5 GB for Qwen2.5-VL-3B in
    bfloat16. Where rounding would lose LoRA's change, it is served beside the weights, which are not copied.
    """

    def __init__(self, backbone: Backbone) -> None:
        model: Any = backbone.decoder
        if any(kind != "full_attention" for kind in getattr(model.config, "layer_types", None) or ()):
            raise ValueError("decoders with sliding-window layers are not supported")
        attention = bare(bare(model.layers[0]).self_attn)
        kv, groups = model.config.num_key_value_heads, attention.num_key_value_groups
        self._heads = Heads(kv, groups, attention.head_dim, attention.scaling)
        beside = loses_too_much(lost_by_merging(model))
        self._layers = [Layer(layer, lora_beside=beside) for layer in model.layers]
        self._norm = Norm(model.norm)
        self._rotary = model.rotary_emb
        self._like = torch.empty(0, dtype=backbone.dtype, device=backbone.device)
        """An empty tensor with the dtype and device of the weights."""

    def attention(self, positions: Tensor) -> Attention:
        """For one prompt and its answer, with position ids [..., 1, T] that are the same in every row."""
        cos, sin = (x[0] for x in self._rotary(self._like.new_zeros(1, 1, 1), positions))
        return Attention(self._heads, cos, sin)

    def new_cache(self, batch: int, capacity: int, prefix: KeyValueCache | None = None) -> KeyValueCache:
        """A cache of `batch` rows for `capacity` positions, beginning with those of `prefix`, of one row."""
        shape = (batch, self._heads.kv, capacity, self._heads.dim)
        layers = [LayerCache(self._like.new_zeros(shape), self._like.new_zeros(shape)) for _ in self._layers]
        if prefix is None:
            return KeyValueCache(layers, 0)
        for own, shared in zip(layers, prefix.layers, strict=True):
            own.keys[:, :, : prefix.length] = shared.keys[:, :, : prefix.length]
            own.values[:, :, : prefix.length] = shared.values[:, :, : prefix.length]
        return KeyValueCache(layers, prefix.length)

    def __call__(
        self,
        x: Tensor,
        attention: Attention,
        cache: KeyValueCache,
        *,
        image_at: Tensor | None = None,
        image: ImageFeatures | None = None,
        outputs: int = 1,
    ) -> Tensor:
        """Hidden states [B, outputs, D] at the last of n new positions, with embeddings `x` [B, n, D].

        The new positions follow those in `cache`, which grows by n. The last layer computes its output for
        the last `outputs` positions only. `image` takes the places `image_at` int64[m]; without it `x` is
        overwritten.
        """
        past, count = cache.length, x.shape[1]
        cache.length += count
        if image_at is not None and image is not None:
            x = x.index_copy(1, image_at, image.tokens.to(x.dtype))
        for i, layer in enumerate(self._layers):
            skip = count - outputs if i + 1 == len(self._layers) else 0
            x = layer(x, attention, cache.layers[i], past, skip)
            if image_at is not None and image is not None and i < len(image.deep):
                x.index_add_(1, image_at, image.deep[i].to(x.dtype))
        return self._norm(x[:, -outputs:])


class Layer:
    """A layer with the present weights of a module of transformers."""

    def __init__(self, module: Any, *, lora_beside: bool = False) -> None:
        module = bare(module)
        attention, mlp = bare(module.self_attn), bare(module.mlp)
        for part in (module, attention, mlp):
            if wrapped(part):
                raise ValueError(f"an adapter replaces a whole {type(part).__name__}, which cannot be served")
        self._input_norm, self._mlp_norm = Norm(module.input_layernorm), Norm(module.post_attention_layernorm)
        project = partial(projection, beside=lora_beside)
        self._qkv = project(attention.q_proj, attention.k_proj, attention.v_proj)
        self._out = project(attention.o_proj)
        self._gate_up, self._down = project(mlp.gate_proj, mlp.up_proj), project(mlp.down_proj)
        self._activation = mlp.act_fn
        names = [name for name in ("q_norm", "k_norm") if hasattr(attention, name)]
        self._head_norms = [Norm(getattr(attention, name)) for name in names]
        """Of queries and keys (Qwen3), or none."""

    def __call__(self, x: Tensor, attention: Attention, cache: LayerCache, past: int, skip: int) -> Tensor:
        """Contiguous `x` [B, n, D], which may be overwritten -> [B, n - skip, D]. See `Attention`."""
        qkv = self._qkv(self._input_norm(x))
        if self._head_norms:
            kv, groups, dim, _ = attention.heads
            parts = qkv.unflatten(-1, (-1, dim)).split((kv * groups, kv, kv), 2)
            for norm, part in zip(self._head_norms, parts, strict=False):
                part.copy_(norm(part))
        attended = attention(qkv, cache, past, skip)
        x = x[:, skip:].contiguous()
        self._out.add_to(x, attended)
        gate, up = self._gate_up(self._mlp_norm(x)).chunk(2, -1)
        self._down.add_to(x, self._activation(gate) * up)
        return x


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary positions of [B, heads, n, dim]: the halves of a head change places, one with a minus."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


def attend(heads: Heads, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """[B, n, kv * groups * dim] for queries [B, kv * groups, n, dim], keys and values [B, kv, T, dim], and a
    mask [1 or B, 1, groups * n, T] that is added to the scores."""
    batch, queries, count, dim = q.shape
    # Query heads that share keys become further queries of one head, so that keys need not be repeated.
    q = q.reshape(batch, heads.kv, heads.groups * count, dim)
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=heads.scale)
    # Some of CUDA's kernels answer in the order [B, n, heads, dim], of which there is no such view.
    return out.reshape(batch, queries, count, -1).transpose(1, 2).reshape(batch, count, -1)


class Attention:
    """Causal attention for the positions of one prompt. It has no weights.

    `cos` and `sin` [T, dim] are the rotary angles of all positions.
    """

    def __init__(self, heads: Heads, cos: Tensor, sin: Tensor) -> None:
        self.heads = heads
        self.cos = cos
        first, second = sin.chunk(2, -1)
        self.signed_sin = torch.cat((-first, second), -1)
        self._masks: dict[tuple[int, int], Tensor] = {}

    def __call__(self, qkv: Tensor, cache: LayerCache, past: int, skip: int) -> Tensor:
        """Attention outputs [B, n - skip, kv * groups * dim] of the positions from `skip` on.

        Args:
            qkv: [B, n, (groups + 2) * kv * dim], the projections of n new positions. Their keys and values
                are written to `cache`.
            past: positions in the cache, which the new ones follow.
            skip: leading new positions whose output is not needed.
        """
        kv, groups, dim, _ = self.heads
        queries, end = kv * groups, past + qkv.shape[1]
        heads = qkv.unflatten(-1, (-1, dim)).transpose(1, 2)
        rotated = rotate(heads[:, : queries + kv], self.cos[past:end], self.signed_sin[past:end])
        cache.keys[:, :, past:end] = rotated[:, queries:]
        cache.values[:, :, past:end] = heads[:, queries + kv :]
        q, keys, values = rotated[:, :queries, skip:], cache.keys[:, :, :end], cache.values[:, :, :end]
        return attend(self.heads, q, keys, values, self._mask(q.shape[2], past + skip, qkv))

    def _mask(self, queries: int, before: int, like: Tensor) -> Tensor | None:
        """[1, 1, groups * queries, before + queries], added to the scores; None if all may be seen."""
        if queries == 1:
            return None
        if (queries, before) not in self._masks:
            mask = causal_mask(queries, before, like.dtype, like.device)
            self._masks[queries, before] = mask.repeat(1, 1, self.heads.groups, 1)
        return self._masks[queries, before]


class Norm:
    """An RMS norm, of a module with `weight` and `variance_epsilon`."""

    def __init__(self, module: Any) -> None:
        self._module = bare(module)
        self._plain = untouched(self._module)

    def __call__(self, x: Tensor) -> Tensor:
        module = self._module
        if self._plain:
            return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)
        normed: Tensor = module(x)
        return normed
