"""peft's adapters: which of them are supported, and how a layer with an adapter is served.

Such a layer is merged by peft, served with its LoRA beside it, or called as the module that it is. Models
with other adapters are refused.
"""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LAYERWISE = frozenset(
    {
        *("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "LN_TUNING", "OFT", "BOFT", "HRA", "VERA", "VBLORA"),
        *("FOURIERFT", "RANDLORA", "SHIRA", "MISS", "C3A", "ROAD", "TRAINABLE_TOKENS"),
    }
)
"""The adapter types that change single layers and nothing else: a layer's output depends on its input only.
Other types prepend tokens or keys, wrap whole attention blocks, or are controlled from outside the layer."""


MOST_LOST = 0.01
"""LoRA is merged to be served only if rounding loses at most this share of its change. With nano in bfloat16
a merge loses 79 % of adapters that are 1/1000 as large as their weights, and 17 % of those that are 1/100 as
large; in float16 21 % and 2 %."""


def check_adapter(config: Mapping[str, Any]) -> None:
    """Raises ValueError unless an adapter with this peft configuration is supported."""
    kind = config.get("peft_type")
    kind = str(getattr(kind, "value", kind))
    if kind not in LAYERWISE:
        raise ValueError(
            f"adapters of type {kind} are not supported: they do more than change single layers; "
            f"give one of {', '.join(sorted(LAYERWISE))}"
        )
    for name in ("alora_invocation_tokens", "arrow_config"):
        if config.get(name):
            raise ValueError(
                f"LoRA adapters with {name} are not supported: what their layers do is decided from outside; "
                "give a LoRA adapter without it"
            )


def check_adapters(model: Any) -> None:
    """Raises ValueError unless all adapters of a model are supported."""
    from peft import PeftModel

    if isinstance(model, PeftModel):
        for config in model.peft_config.values():
            check_adapter(config.to_dict())
        if any(_is_dora_on_8bit_cpu(layer) for layer in _layers(model)):
            raise ValueError(
                "DoRA adapters on 8-bit weights do not run on the CPU (peft drops their scales at the first "
                "call): take quantization='4bit' or 'none'"
            )
    elif _layers(model):
        raise ValueError(
            f"a {type(model).__name__} holds adapters, but only a peft.PeftModel may: open the adapter's own "
            "directory"
        )


def _layers(model: Any) -> list[Any]:
    """The layers of a model that have adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _is_dora_on_8bit_cpu(layer: Any) -> bool:
    weight: Any = getattr(layer.get_base_layer(), "weight", None)
    eight_bits_on_cpu = type(weight).__name__ == "Int8Params" and weight.device.type == "cpu"
    return eight_bits_on_cpu and any(getattr(layer, "use_dora", {}).values())


def check_savable(model: Any) -> None:
    """Raises ValueError unless the adapters of a peft model, opened again, give the same answers."""
    status = model.get_model_status()
    if (list(model.peft_config), model.active_adapters, status.enabled) != (["default"], ["default"], True):
        raise ValueError(
            "only one adapter, named 'default', active and enabled, can be saved: delete_adapter() the "
            "others, or merge them into the base"
        )


def check_tunable(model: Any) -> None:
    """Raises ValueError unless the adapters of a model can be trained. A model without adapters passes."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return
    for config in model.peft_config.values():
        settings = config.to_dict()
        if settings["peft_type"] == "ADALORA":
            raise ValueError(
                "AdaLoRA adapters are served but not tuned, because their training shifts ranks and has a "
                "loss of its own: merge the adapter into its base, and tune that"
            )
        if settings.get("ensure_weight_tying") and all(end in _layers(model) for end in _ends(model)):
            raise ValueError(
                "an adapter that ties those of head and embeddings (ensure_weight_tying) is served but not "
                "tuned, because peft's layers of it cannot be copied: take mode='full'"
            )
    status = model.get_model_status()
    if status.merged_adapters:
        raise ValueError("merged adapters cannot be tuned: call unmerge_adapter() of the peft model")
    if status.enabled is not True:
        raise ValueError("disabled adapters cannot be tuned: call enable_adapter_layers() of the peft model")
    if status.trainable_params == 0:
        raise ValueError("all weights of the prior's adapter are frozen: unfreeze them, or set mode='full'")


def check_foldable(model: Any) -> None:
    """Raises ValueError unless a model's adapters, if any, can be merged into its weights.

    peft refuses these too, but only when it has merged some of the layers.
    """
    for layer in _layers(model):
        biased = any(getattr(layer, "lora_bias", {}).values())
        if biased and getattr(layer.get_base_layer(), "bias", None) is None:
            raise ValueError(
                "an adapter with lora_bias=True cannot be folded into layers that have no bias: take "
                "mode='lora'"
            )


def merge_for_good(model: Any) -> Any:
    """The transformers model of a peft model, with enabled adapters merged into its weights."""
    enabled = model.get_model_status().enabled is True
    base = model.get_base_model()
    ends = _ends(base)
    embeddings, head = (end.get_base_layer() if end in _layers(base) else end for end in ends)
    if (embeddings, head) != ends and head.weight is embeddings.weight:
        # One matrix, of which only embeddings or head have an adapter: merging must not change the other.
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        for config in (base.config, base.config.get_text_config()):
            config.tie_word_embeddings = False
    return model.merge_and_unload() if enabled else model.unload()


def _ends(model: Any) -> tuple[Any, Any]:
    """The input embeddings and the output head."""
    return model.get_input_embeddings(), model.get_output_embeddings()


# ---- single modules ----


def wrapped(module: Any) -> bool:
    """Whether peft put this module in the place of another one."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def bare(module: Any) -> Any:
    """The module that computes, where peft keeps a full copy of one (`modules_to_save`); else `module`."""
    from peft.utils import ModulesToSaveWrapper

    if type(module) is not ModulesToSaveWrapper:
        return module
    active = module.active_adapters
    if module.disable_adapters or not active or any(name not in module.modules_to_save for name in active):
        return module.original_module
    return module.modules_to_save[active[0]]


def untouched(module: nn.Module) -> bool:
    """Whether a module is called as its type says: no adapter, no hooks, no `forward` of the instance."""
    return not wrapped(module) and not _hooked(module)


def _hooked(module: nn.Module) -> bool:
    return bool("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


class LinearParts(NamedTuple):
    """What a linear layer computes: x weight' + bias + (x down') up'. Without `down` and `up` nothing is
    added."""

    weight: Tensor
    """[N, K]"""
    bias: Tensor | None
    """[N]"""
    down: Tensor | None = None
    """[R, K]: the first factors of its LoRA adapters."""
    up: Tensor | None = None
    """[N, R]: the second ones, with their scales."""


def merged_linear(module: Any) -> LinearParts | None:
    """A linear layer with its LoRA adapters in the weight; None if the module must be called.

    peft merges, on a copy of the layer and as its forward would: active and enabled adapters only.
    """
    if not _is_linear(module):
        return None
    base = _merged_copy(module) if wrapped(module) else module
    return LinearParts(base.weight.detach(), None if base.bias is None else base.bias.detach())


def linear_beside_lora(module: Any) -> LinearParts | None:
    """A linear layer's own weight, not copied, and its LoRA adapters in the same dtype; None if the module
    must be called, as for variants of LoRA, such as DoRA."""
    if not wrapped(module) or not _is_linear(module) or module.merged:
        return merged_linear(module)
    base, bias = module.base_layer, module.base_layer.bias
    parts = LinearParts(base.weight.detach(), None if bias is None else bias.detach())
    active = _active(module)
    if any(name in module.lora_variant or module.lora_bias[name] for name in active):
        return None
    if not active:
        return parts
    dtype = base.weight.dtype
    down = torch.cat([module.lora_A[name].weight for name in active])
    up = torch.cat([module.lora_B[name].weight * module.scaling[name] for name in active], 1)
    return parts._replace(down=down.detach().to(dtype), up=up.detach().to(dtype))


@torch.no_grad()
def lost_by_merging(model: nn.Module) -> float | None:
    """Share of the change by LoRA adapters that rounding to the weights' dtype would lose in a merge.

    ||round(W + D) - (W + D)|| / ||D|| over all linear layers whose adapters add D to their weights W. None if
    there are none, or none in half precision, because float32 keeps all that matters. NaN if D is 0 (fresh
    adapters).
    """
    lost, change, found = 0.0, 0.0, False
    for layer in _layers(model):
        if not _is_linear(layer) or layer.merged or not _active(layer):
            continue
        weight = layer.base_layer.weight
        if weight.dtype.itemsize >= 4:
            continue
        found = True
        exact = _merged_copy(layer, torch.float32).weight
        lost = lost + (exact.to(weight.dtype).float() - exact).square().sum()
        change = change + (exact - weight.float()).square().sum()
    return float((lost / change) ** 0.5) if found else None


def loses_too_much(lost: float | None) -> bool:
    """Whether LoRA must be served beside the weights, because a merge would lose this share of its change.

    Fresh adapters (NaN) are, too: after the first round they would have to be, and until then a copy of the
    weights would only take memory.
    """
    return lost is not None and not lost <= MOST_LOST


def _is_linear(module: Any) -> bool:
    """Whether a module is torch's linear layer, possibly with LoRA, and nothing else is done with it."""
    from peft.tuners.lora.layer import Linear

    base = module.base_layer if type(module) is Linear else module
    return type(base) is nn.Linear and not _hooked(base) and not _hooked(module)


def _active(module: Any) -> list[str]:
    """The adapters of a LoRA layer that its forward adds."""
    if module.disable_adapters:
        return []
    return [name for name in module.active_adapters if name in module.lora_A]


def _merged_copy(module: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of the linear layer under a LoRA layer, with the adapters that its forward adds."""
    module = copy.deepcopy(module)
    if dtype is not None:
        module.to(dtype)
    base = module.base_layer
    if base.bias is None and any(module.lora_bias.values()):  # peft merges into an existing bias only
        base.bias = nn.Parameter(base.weight.new_zeros(len(base.weight)), requires_grad=False)
    if module.disable_adapters and module.merged:
        module.unmerge()
    elif not module.disable_adapters and not module.merged:
        module.merge()
    return base
