"""Opening models: "nano", a directory, or a hub id; full weights, or an adapter on a base."""

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...files import read_json
from .adapters import check_adapter
from .attention import choose_attention
from .backbones import Backbone, backbone_class
from .folder import ADAPTER_FILE, SETTINGS_FILE
from .nano import write_nano
from .processor import load_processor, quiet
from .quantized import bitsandbytes_config, check_own_quantization, prepare

_PUT_BACK = "put back a copy of it, or save the prior anew"


@dataclass(frozen=True)
class Settings:
    """The settings of a saved prior that are not in its checkpoint: the content of `action_prior.json`."""

    base: str
    """Where the weights without an adapter come from: "nano", a directory or a hub id."""
    seed: int
    """Seed of nano's random weights; unused otherwise."""
    action_dim: int
    """Numbers in an action."""
    decimals: int
    """Digits after the point in answers."""
    prompt: str | None
    """The task in words; None for the default prompt."""
    dtype: str | None = None
    """Dtype of the weights, such as "bfloat16". None: the default of the device."""
    quantization: dict[str, Any] | None = None
    """How the base is quantized when it is loaded: see `quantized.quantization_settings`."""
    image_size: int = 0
    """The longer side of the frames that the VLM sees, in pixels; 0 for frames as they are."""

    def save(self, directory: Path) -> None:
        (directory / SETTINGS_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "Settings | None":
        """The settings in a directory; None if it has none. Raises ValueError if they are damaged."""
        file = directory / SETTINGS_FILE
        if not file.is_file():
            return None
        try:
            settings = cls(**read_json(file, _PUT_BACK))
        except TypeError as error:
            raise ValueError(f"{file} is damaged ({error}): {_PUT_BACK}") from error
        if settings.dtype is not None and not isinstance(getattr(torch, settings.dtype, None), torch.dtype):
            raise ValueError(f"{file} is damaged (dtype {settings.dtype!r}): {_PUT_BACK}")
        return settings


def load_backbone(
    model: str | Path,
    *,
    seed: int,
    attention: str,
    dtype: torch.dtype | None,
    device: torch.device,
    quantization: dict[str, Any] | None = None,
) -> Backbone:
    """Loads a model and its processor, and the adapter if `model` is the directory of one.

    Quantization settings are those of `quantized.quantization_settings`; None loads the weights as they are
    stored. For the errors see `ActionPrior.from_pretrained`.
    """
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    attention = choose_attention(attention, device, dtype)
    load = partial(
        _load_checkpoint, dtype=dtype, device=device, attention=attention, quantization=quantization
    )
    source, directory = str(model), Path(model)
    adapted = source != "nano" and (directory / ADAPTER_FILE).is_file()
    if adapted:
        source = _base_of(directory)
    if source == "nano":
        with tempfile.TemporaryDirectory() as folder, quiet():
            write_nano(folder, seed=seed)
            backbone = load(folder)
        backbone.base.name_or_path = backbone.base.config.name_or_path = "nano"  # the folder is gone
    else:
        # Absolute, because an adapter of this base may be opened from another working directory.
        backbone = load(os.path.abspath(source) if Path(source).is_dir() else source)
    if adapted:
        _put_adapter_on(backbone, directory, source)
    return backbone


# ---- full weights ----


def _load_checkpoint(
    source: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str,
    quantization: dict[str, Any] | None,
) -> Backbone:
    from transformers import AutoModelForImageTextToText

    config = _read_config(source)
    cls = backbone_class(config.model_type)
    check_own_quantization(source, config, asked=quantization is not None)
    quantized = bool(quantization) or getattr(config, "quantization_config", None) is not None
    options: dict[str, Any] = {"device_map": {"": device}} if quantized else {}
    if quantization:
        options["quantization_config"] = bitsandbytes_config(quantization, dtype)
    processor = load_processor(source, config)
    with quiet():
        model: Any = AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype, attn_implementation=attention, **options
        )
    if quantized:
        prepare(model)
    return cls(model if quantized else model.to(device), processor)


def _read_config(source: str) -> Any:
    from transformers import AutoConfig

    # A hub id is `owner/name`. Anything else that is not a directory is a path with a mistake in it.
    if not Path(source).is_dir() and (source.startswith((".", "/", "~")) or source.count("/") != 1):
        raise FileNotFoundError(
            f"no model directory at {source!r}; give 'nano', a checkpoint directory or a hub id"
        )
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read a model configuration from {source!r}: {error}") from error


# ---- adapters ----


def _base_of(directory: Path) -> str:
    """The base that the adapter in a directory names. It exists, and the adapter is supported."""
    file = directory / ADAPTER_FILE
    config = read_json(file, _PUT_BACK)
    check_adapter(config)
    full = [*directory.glob("model*.safetensors*"), *directory.glob("pytorch_model*.bin*")]
    if full:
        weights = ", ".join(sorted(path.name for path in full))
        raise ValueError(
            f"{str(directory)!r} holds full weights and an adapter, of which one is stale: remove "
            f"{ADAPTER_FILE} and adapter_model.safetensors, or config.json and {weights}"
        )
    saved = Settings.load(directory)
    base: str | None = config.get("base_model_name_or_path") or (saved.base if saved else None)
    remedy = f'write where it is into "base_model_name_or_path" of {file}'
    if not base:
        raise ValueError(f"the adapter in {str(directory)!r} names no base: {remedy}")
    if (Path(base) / ADAPTER_FILE).is_file():
        raise ValueError(
            f"the base {base!r} of the adapter in {str(directory)!r} is an adapter itself: merge it "
            f"into its base, and {remedy}"
        )
    if base != "nano":
        try:
            _read_config(base)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(
                f"the base {base!r} of the adapter in {str(directory)!r} cannot be opened: put it back, or "
                f"{remedy} ({error})"
            ) from error
    return base


def _put_adapter_on(backbone: Backbone, directory: Path, base: str) -> None:
    from peft import PeftModel
    from peft.utils import load_peft_weights

    source = backbone.source
    try:
        model = PeftModel.from_pretrained(backbone.model, directory, is_trainable=True)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the LoRA adapter in {str(directory)!r} does not fit its base {base!r}: {error}"
        ) from error
    model.peft_config["default"].base_model_name_or_path = source
    backbone.model = model
    embeddings = ("embed_tokens.weight", "lm_head.weight", "base_layer.weight")
    backbone.adapter_has_embeddings = any(
        name.endswith(embeddings) for name in load_peft_weights(str(directory), device="cpu")
    )
