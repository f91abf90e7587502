"""peft's adapters: which ones the fast path and the tuner can run, and how it runs a layer that one wraps.

A layer is merged by peft's own merge, or called as the module it is, or its model is refused. Types decide.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...files import read_json
from .folder import ADAPTER_FILE

LAYERWISE = frozenset(
    {
        *("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "LN_TUNING", "OFT", "BOFT", "HRA", "VERA", "VBLORA"),
        *("FOURIERFT", "RANDLORA", "SHIRA", "MISS", "C3A", "ROAD", "TRAINABLE_TOKENS"),
    }
)
"""The adapter types that change what single layers compute, and nothing else: a layer's output depends on its
input alone. Others prepend tokens or keys, wrap whole attention blocks, or are steered from outside."""


def check_adapter(config: Mapping[str, Any]) -> None:
    """Raises ValueError unless the adapter of a peft configuration, as in its file, can be served."""
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


def check_adapter_directory(directory: Path) -> None:
    """`check_adapter` for a directory that may hold an adapter."""
    file = directory / ADAPTER_FILE
    if file.is_file():
        check_adapter(read_json(file, "put back a copy of it"))


def check_adapters(model: Any) -> None:
    """Raises ValueError unless all adapters of a model can be served."""
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
    """The layers of a model that adapters change."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _is_dora_on_8bit_cpu(layer: Any) -> bool:
    weight: Any = getattr(layer.get_base_layer(), "weight", None)
    eight_bits_on_cpu = type(weight).__name__ == "Int8Params" and weight.device.type == "cpu"
    return eight_bits_on_cpu and any(getattr(layer, "use_dora", {}).values())


def disabled(model: Any) -> bool:
    """Whether a model has adapters that are switched off."""
    return any(layer.disable_adapters for layer in _layers(model))


def check_savable(model: Any) -> None:
    """Raises ValueError unless the adapters of a peft model, opened again, answer as they do now."""
    if list(model.peft_config) != ["default"] or model.active_adapters != ["default"] or disabled(model):
        raise ValueError(
            "only one adapter, named 'default', active and enabled, can be saved: delete_adapter() the "
            "others, or merge them into the base"
        )


def check_tunable(model: Any) -> None:
    """Raises ValueError unless the adapters that a model has, if any, can be trained."""
    for config in getattr(model, "peft_config", {}).values():
        settings = config.to_dict()
        if settings["peft_type"] == "ADALORA":
            raise ValueError(
                "AdaLoRA adapters are served but not tuned, because their training shifts ranks and has a "
                "loss of its own: merge the adapter into its base, and tune that"
            )
        if settings.get("ensure_weight_tying") and _both_ends_are_adapted(model):
            raise ValueError(
                "an adapter that ties those of head and embeddings (ensure_weight_tying) is served but not "
                "tuned, because peft's layers of it cannot be copied: take mode='full'"
            )
    layers = _layers(model)
    if any(layer.merged for layer in layers):
        raise ValueError("merged adapters cannot be tuned: call unmerge_adapter() of the peft model")
    if disabled(model):
        raise ValueError("disabled adapters cannot be tuned: call enable_adapter_layers() of the peft model")
    if layers and not any(p.requires_grad for p in model.parameters()):
        raise ValueError("all weights of the prior's adapter are frozen: unfreeze them, or set mode='full'")


def _both_ends_are_adapted(model: Any) -> bool:
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    return all(end in _layers(model) for end in ends)


def check_foldable(model: Any) -> None:
    """Raises ValueError unless a model's adapters, if any, can be folded into its weights."""
    for layer in _layers(model):
        biased = any(getattr(layer, "lora_bias", {}).values())
        if biased and getattr(layer.get_base_layer(), "bias", None) is None:
            raise ValueError(
                "an adapter with lora_bias=True cannot be folded into layers that have no bias: take "
                "mode='lora'"
            )


def untie(model: Any) -> None:
    """Gives the head of a transformers model its own weight, where an adapter changes the one it shares."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    embeddings, head = (end.get_base_layer() if end in _layers(model) else end for end in ends)
    if (embeddings, head) == ends or head.weight is not embeddings.weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def wrapped(module: Any) -> bool:
    """Whether peft put this module in the place of another one."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def bare(module: Any) -> Any:
    """The module that is in use, where peft trains a full copy of one (`modules_to_save`); else `module`."""
    from peft.utils import ModulesToSaveWrapper

    if type(module) is not ModulesToSaveWrapper:
        return module
    active = module.active_adapters
    if module.disable_adapters or not active or any(name not in module.modules_to_save for name in active):
        return module.original_module
    return module.modules_to_save[active[0]]


def hooked(module: nn.Module) -> bool:
    """Whether calling a module may do other things than its type says."""
    return bool("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


def untouched(module: nn.Module) -> bool:
    """Whether a module is neither adapted nor hooked."""
    return not wrapped(module) and not hooked(module)


def mergeable(module: Any) -> bool:
    """Whether `linear_weights` can tell what this module computes."""
    from peft.tuners.lora.layer import Linear
    from peft.tuners.lora.variants import DoraLinearVariant

    if type(module) is Linear and not hooked(module):
        plain = all(type(variant) is DoraLinearVariant for variant in module.lora_variant.values())
        return plain and _is_linear(module.base_layer)
    return _is_linear(module)


def _is_linear(module: Any) -> bool:
    return type(module) is nn.Linear and untouched(module)


def linear_weights(module: Any) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear layer, LoRA merged in; None if it must be called as the module it is.

    Merging is peft's, on a copy of the layer, and follows its state: active, disabled and merged adapters.
    """
    if not mergeable(module):
        return None
    if type(module) is nn.Linear:
        return module.weight.detach(), None if module.bias is None else module.bias.detach()
    adapters = {id(p): p for name, p in module.named_parameters() if not name.startswith("base_layer.")}
    merged = copy.deepcopy(module, adapters)
    base = merged.base_layer
    if base.bias is None and any(merged.lora_bias.values()):
        base.bias = nn.Parameter(base.weight.new_zeros(base.weight.shape[0]), requires_grad=False)
    if merged.disable_adapters:
        if merged.merged:
            merged.unmerge()
    elif not merged.merged:
        merged.merge()
    return base.weight.detach(), None if base.bias is None else base.bias.detach()
