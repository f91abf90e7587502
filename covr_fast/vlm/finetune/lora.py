"""Which weights are trained, and the tuner's own copy of them."""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from ..model.backbones import Backbone
from ..model.quantized import shared_state


def trainable(model: nn.Module) -> list[Tensor]:
    """The weights that fine-tuning changes, in a fixed order."""
    return [p for p in model.parameters() if p.requires_grad]


def add_lora(backbone: Backbone, rank: int, alpha: int, seed: int) -> None:
    """Adds fresh LoRA adapters to the model, unless it has an adapter already.

    Fresh adapters do not change the answers: their second factor is zero.
    """
    from peft import LoraConfig, get_peft_model

    if backbone.adapted:
        return
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=backbone.lora_targets,
        bias="none",
        base_model_name_or_path=backbone.source,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone.model = get_peft_model(backbone.model, config)


def make_replica(backbone: Backbone, mode: Literal["lora", "full"]) -> Backbone:
    """A backbone that computes the same. It has its own trainable weights and shares the frozen ones."""
    if mode == "full":
        backbone.model.requires_grad_(True)
    frozen = (p for p in backbone.model.parameters() if not p.requires_grad)
    shared = {id(x): x for x in (*frozen, *shared_state(backbone.model))}
    return backbone.with_model(copy.deepcopy(backbone.model, shared))


def snapshot(weights: list[Tensor]) -> list[Tensor]:
    """Copies of the present values."""
    return [w.detach().clone() for w in weights]


@torch.no_grad()
def assign(weights: list[Tensor], values: list[Tensor]) -> None:
    """Copies `values` into `weights`, in place."""
    torch._foreach_copy_(weights, values)
