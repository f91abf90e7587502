"""Qwen2.5-VL's vision tower as it serves on the CPU in float32: its layers and its first product in C++.

The frames of a call have one size, so their windows, order and angles are those of one image, and made once.
Weights are merged as in `serving.py`: a second copy, refreshed when weights are published. The results are
those of transformers' modules; tests compare them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from covr_fast.ops._backend import launch

from ..model.adapters import linear_weights, untouched, wrapped
from ..model.backbones import Backbone, ImageFeatures, QwenVL
from ..model.patches import PatchPixels
from .attend import Heads, signed
from .cpp_layers import CppLayer, cpp_layer
from .layers import LayerModules, Norm, Projection


class ServingTower:
    """The tower with its present weights, for frames of one size. Ask `make_tower` for one.

    Args:
        tower: transformers' module.
        blocks: its blocks in C++.
        patches: how frames are cut.
        plan: its index tensors for one frame, whose windows are equal.
    """

    def __init__(
        self, tower: Any, blocks: list[CppLayer], patches: PatchPixels, plan: Mapping[str, Any]
    ) -> None:
        order = plan["window_index"]
        self._order = None if torch.equal(order, torch.arange(len(order), device=order.device)) else order
        self._inverse = order.argsort()
        self._merged = tower.spatial_merge_unit
        self._patches = patches
        self._embed = Projection(_still(tower.patch_embed.proj))
        angles = tower.rotary_pos_emb(tower.patch_embed.proj.weight.detach(), plan["position_ids"])
        cos, sin = (x.unflatten(0, (-1, self._merged))[order].flatten(0, 1) for x in angles)
        self._cos, self._sin = cos.contiguous(), signed(sin)
        full = tower.fullatt_block_indexes
        self._blocks = [
            (block, plan["max_seqlen" if i in full else "max_window_seqlen"])
            for i, block in enumerate(blocks)
        ]
        self._norm = Norm(tower.merger.ln_q)
        widen, self._activation, project = tower.merger.mlp
        self._widen, self._project = Projection(widen), Projection(project)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> ImageFeatures:
        """Image tokens of frames uint8[B, 3, H, W], on any device."""
        x = self._embedded(self._patches.resize(images.cpu()).contiguous())
        for block, segment in self._blocks:
            block.encode(x, segment, self._cos, self._sin)
        x = self._norm(x).view(len(images), -1, self._merged * x.shape[-1])
        tokens = self._project(self._activation(self._widen(x)))
        return ImageFeatures(tokens if self._order is None else tokens.index_select(1, self._inverse))

    def _embedded(self, images: Tensor) -> Tensor:
        """The patches of resized frames [B, patches, D], in the order in which windows are contiguous."""
        p = self._patches
        batch, _, height, width = images.shape
        x = p.scale.new_empty(batch, height // p.patch * (width // p.patch), self._embed.outputs)
        launch(
            "embed_patches",
            *((x, torch.float32), (images, torch.uint8), (p.scale, torch.float32), (p.offset, torch.float32)),
            0 if self._order is None else (self._order, torch.int64),
            *(batch, height, width, p.patch, p.merge, self._embed.cpp, torch.get_num_threads()),
        )
        return x


def make_tower(backbone: Backbone, size: tuple[int, int]) -> ServingTower | None:
    """The tower of `backbone` for frames of `size` (height, width).

    None where transformers' modules have to run: for another architecture, dtype or device, sizes that do not
    divide into equal windows, adapters that cannot be merged, and where `cpp_layer` says so.
    """
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    if not isinstance(backbone, QwenVL):
        return None
    tower = backbone.tower
    if not isinstance(tower, Qwen2_5_VisionTransformerPretrainedModel):
        return None
    if any(wrapped(module) and linear_weights(module) is None for module in tower.modules()):
        return None
    if type(tower.patch_embed.proj) is not nn.Conv3d or not untouched(tower.patch_embed.proj):
        return None
    attention: Any = tower.blocks[0].attn
    heads = Heads(attention.num_heads, 1, attention.head_dim, attention.scaling)
    blocks: list[CppLayer] = []
    for block in tower.blocks:
        layer = cpp_layer(_modules(block), heads)
        if layer is None:
            return None
        blocks.append(layer)
    _, plan = backbone.plan(1, size)
    windows = plan["cu_window_seqlens"].diff()
    if (windows != windows[0]).any():
        return None
    return ServingTower(tower, blocks, backbone.patches, plan)


def _still(convolution: Any) -> nn.Linear:
    """A patch embedding as a linear layer of one image's patch: a still image is all frames of the patch."""
    weight = convolution.weight.detach().sum(2).flatten(1)
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if convolution.bias is not None:
        linear.bias = nn.Parameter(convolution.bias.detach(), requires_grad=False)
    return linear


def _modules(block: Any) -> LayerModules:
    return LayerModules(
        input_norm=block.norm1,
        qkv=(block.attn.qkv,),
        out=block.attn.proj,
        mlp_norm=block.norm2,
        mlp=block.mlp,
    )
