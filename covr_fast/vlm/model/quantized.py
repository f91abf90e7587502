"""Models with frozen weights in 8 or 4 bits, by bitsandbytes: for serving, and as the base of LoRA."""

import importlib.util
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def quantization_settings(asked: Any) -> dict[str, Any]:
    """The settings for `bitsandbytes_config` that an argument means, as JSON types; empty for "none".

    "8bit" is LLM.int8(); "4bit" is NF4 with quantized scales, as in QLoRA. A `BitsAndBytesConfig` of
    transformers is taken as it is.
    """
    if asked == "none":
        return {}
    if asked == "8bit":
        return {"load_in_8bit": True}
    if asked == "4bit":
        return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    from transformers import BitsAndBytesConfig

    if not isinstance(asked, BitsAndBytesConfig):
        given = repr(asked) if isinstance(asked, str) else type(asked).__name__
        raise ValueError(
            f"quantization={given} is not supported: give 'none', '8bit', '4bit' or a BitsAndBytesConfig"
        )
    if not asked.is_quantizable() or asked.llm_int8_has_fp16_weight:
        raise ValueError(
            "quantization must set load_in_8bit or load_in_4bit, and not llm_int8_has_fp16_weight, which "
            "would keep weights that are not quantized"
        )
    return asked.to_dict()


def bitsandbytes_config(settings: dict[str, Any], dtype: torch.dtype) -> Any:
    """A `BitsAndBytesConfig`. 4-bit layers compute in `dtype` unless the settings say otherwise."""
    from transformers import BitsAndBytesConfig

    check_installed()
    return BitsAndBytesConfig.from_dict({"bnb_4bit_compute_dtype": dtype} | settings)


def check_own_quantization(source: str, config: Any, *, asked: bool) -> None:
    """Raises ValueError if a checkpoint contains quantized weights that are not supported, or any if the
    caller has `asked` for a quantization ("none" included)."""
    own = getattr(config, "quantization_config", None)
    if own is None:
        return
    method = own.get("quant_method") if isinstance(own, dict) else own.quant_method
    method = str(getattr(method, "value", method))
    if method != "bitsandbytes":
        raise ValueError(
            f"the checkpoint {source!r} is quantized by {method!r}, which is not supported: give the one "
            "that it was made from, with quantization='8bit' or '4bit'"
        )
    if asked:
        raise ValueError(f"the checkpoint {source!r} is quantized already: leave out quantization")
    check_installed()


def check_installed() -> None:
    """Raises ValueError if bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("quantized weights need bitsandbytes: pip install 'covr-fast[quantize]'")


def prepare(model: nn.Module) -> None:
    """Completes the state of a quantized model's layers, so that a replica can share their weights.

    bitsandbytes would do this at a layer's first call, and only for the module that is called.
    """
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_news)
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, Linear8bitLt) and weight.CB is not None:
            module.init_8bit_state()
        elif isinstance(module, Linear4bit):
            # On some CPUs bitsandbytes would repack the weights in place, for products without a gradient.
            module.support_avx512bf16_for_cpu = False


def shared_state(model: nn.Module) -> Iterator[Any]:
    """What quantized layers store besides parameters and never change: scales, and the weights once more."""
    for module in model.modules():
        state: Any = getattr(module, "state", None)
        if type(state).__name__ == "MatmulLtState":
            yield from (state.CB, state.SCB)
        elif getattr(module, "quant_state", None) is not None:
            yield module.quant_state


def _is_news(record: logging.LogRecord) -> bool:
    """False for a message of bitsandbytes at every call of an 8-bit layer: that it computes in float16."""
    return "inputs will be cast" not in str(record.msg)
