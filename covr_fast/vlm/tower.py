"""Qwen2.5-VL's vision tower as it serves on the CPU in float32, of the parts that the language model has.

The frames of a call have one size, so their windows, order and angles are those of one image, and made once.
Weights are merged as in `serving.py`: a second copy, refreshed when weights are published. The results are
those of transformers' modules; tests compare them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attend import SegmentAttention
from .backbones import Backbone, ImageFeatures, QwenVL
from .layers import GatedMlp, Norm, Projection


@dataclass(frozen=True)
class _Block:
    attention_norm: Norm
    qkv: Projection
    segment: int
    """Successive patches that see each other: a window's, or all of an image."""
    out: Projection
    mlp_norm: Norm
    mlp: GatedMlp


class ServingTower:
    """The tower with its present weights, for frames of one size. Ask `make_tower` for one.

    Args:
        tower: transformers' module.
        plan: its index tensors for one frame, whose windows are equal.
    """

    def __init__(self, tower: Any, plan: Mapping[str, Any]) -> None:
        order = plan["window_index"]
        self._order = None if torch.equal(order, torch.arange(len(order))) else order
        self._inverse = order.argsort()
        self._merged = tower.spatial_merge_unit
        self._embed = tower.patch_embed
        weight = self._embed.proj.weight.detach()
        cos, sin = (self._by_window(x[None])[0] for x in tower.rotary_pos_emb(weight, plan["position_ids"]))
        attention = tower.blocks[0].attn
        self._attend = SegmentAttention(attention.num_heads, attention.head_dim, attention.scaling, cos, sin)
        self._blocks = [
            _prepare(block, plan["max_seqlen" if i in tower.fullatt_block_indexes else "max_window_seqlen"])
            for i, block in enumerate(tower.blocks)
        ]
        self._norm = Norm(tower.merger.ln_q)
        widen, self._activation, project = tower.merger.mlp
        self._widen, self._project = Projection(widen), Projection(project)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, batch: int) -> ImageFeatures:
        """Image tokens of `batch` frames.

        Args:
            pixels: float32[batch * patches, ...] from `QwenVL.pixels`.
        """
        x = self._by_window(self._embed(pixels).view(batch, len(pixels) // batch, -1))
        for block in self._blocks:
            attended = self._attend(block.qkv(block.attention_norm(x)), block.segment)
            block.out.add_to(x, attended)
            block.mlp.add_to(x, block.mlp_norm(x))
        x = self._norm(x).view(batch, -1, self._merged * x.shape[-1])
        tokens = self._project(self._activation(self._widen(x)))
        return ImageFeatures(tokens if self._order is None else tokens.index_select(1, self._inverse))

    def _by_window(self, x: Tensor) -> Tensor:
        """[B, patches, D] of frames, in the order in which windows are contiguous."""
        if self._order is None:
            return x
        return x.unflatten(1, (-1, self._merged)).index_select(1, self._order).flatten(1, 2)


def make_tower(backbone: Backbone, size: tuple[int, int]) -> ServingTower | None:
    """The tower of `backbone` for frames of `size` (height, width).

    None where transformers' modules have to run: for another architecture, dtype or device, heads whose
    dimension 16 does not divide, and sizes that do not divide into equal windows.
    """
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    if not isinstance(backbone, QwenVL):
        return None
    tower = backbone.tower
    if not isinstance(tower, Qwen2_5_VisionTransformerPretrainedModel):
        return None
    head_dim = tower.config.hidden_size // tower.config.num_heads
    if not SegmentAttention.takes(head_dim, tower.patch_embed.proj.weight):
        return None
    _, plan = backbone.plan(1, size)
    windows = plan["cu_window_seqlens"].diff()
    return ServingTower(tower, plan) if (windows == windows[0]).all() else None


def _prepare(block: Any, segment: int) -> _Block:
    return _Block(
        attention_norm=Norm(block.norm1),
        qkv=Projection(block.attn.qkv),
        segment=segment,
        out=Projection(block.attn.proj),
        mlp_norm=Norm(block.norm2),
        mlp=GatedMlp(block.mlp),
    )
