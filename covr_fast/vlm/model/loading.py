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
from .folder import ADAPTER_FILE, NANO_BASE, SETTINGS_FILE, model_folder
from .hub import hub_folder, is_hub_id
from .nano import write_nano
from .processor import load_processor, quiet
from .quantized import bitsandbytes_config, check_own_quantization, prepare

_PUT_BACK = "put back a copy of it, or save the prior anew"


@dataclass(frozen=True)
class Settings:
    """The settings of a saved prior that are not in its checkpoint: the content of `action_prior.json`."""

    base: str
    """Where the weights come from, before they were tuned: "nano", a directory or a hub id. An adapter needs
    it."""
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


@dataclass(frozen=True)
class Source:
    """Where a model comes from."""

    name: str
    """"nano", an absolute directory or a hub id: what an adapter says of its base."""
    folder: Path | None
    """The directory with its files. None for nano, which is made from a seed."""

    @property
    def adapted(self) -> bool:
        """Whether it is an adapter, which has a base."""
        return self.folder is not None and (self.folder / ADAPTER_FILE).is_file()


def find_model(model: str | Path, *, weights: bool = True) -> Source:
    """Finds "nano", a directory, or a hub id, whose files are downloaded if necessary, with or without the
    weights.

    Raises:
        OSError: there is no such model (FileNotFoundError), or it cannot be downloaded.
        ValueError: it is the folder of a run, which contains the model further down.
    """
    name, folder = str(model), Path(model_folder(model))
    if name == "nano":
        return Source(name, None)
    if folder.is_dir():
        if (inside := Path(model_folder(folder / "checkpoint" / "vlm"))).is_dir():
            raise ValueError(f"{name!r} is the folder of a run: give that of its VLM, {str(inside)!r}")
        # Absolute, because an adapter of this base may be opened from another working directory.
        return Source(os.path.abspath(folder), folder)
    if not is_hub_id(name):
        raise FileNotFoundError(
            f"no model directory at {name!r}; give 'nano', a checkpoint directory or a hub id"
        )
    return Source(name, hub_folder(name, weights=weights))


def load_backbone(
    model: str | Path | Source,
    *,
    seed: int,
    attention: str,
    dtype: torch.dtype | None,
    device: torch.device,
    quantization: dict[str, Any] | None = None,
) -> Backbone:
    """Loads a model and its processor, and the adapter if `model` is one.

    Quantization settings are those of `quantized.quantization_settings`; None loads the weights as they are
    stored. For the errors see `ActionPrior.from_pretrained`.
    """
    source = model if isinstance(model, Source) else find_model(model)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = choose_attention(attention, device, dtype)
    base = base_of(source) if source.adapted else source
    load = partial(
        _load_checkpoint,
        base.name,
        dtype=dtype,
        device=device,
        attention=chosen.name,
        quantization=quantization,
    )
    if base.folder is not None:
        backbone = load(base.folder)
    else:
        with tempfile.TemporaryDirectory() as folder, quiet():
            write_nano(folder, seed=seed)
            backbone = load(Path(folder))
    backbone.attention_reason = chosen.reason
    if source.adapted:
        _put_adapter_on(backbone, source)
    return backbone


# ---- full weights ----


def _load_checkpoint(
    name: str,
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str,
    quantization: dict[str, Any] | None,
) -> Backbone:
    """The model in `folder`, which says that it comes from `name`."""
    from transformers import AutoModelForImageTextToText

    config = read_config(name, folder)
    cls = backbone_class(config.model_type)
    check_own_quantization(name, config, asked=quantization is not None)
    quantized = bool(quantization) or getattr(config, "quantization_config", None) is not None
    options = {"quantization_config": bitsandbytes_config(quantization, dtype)} if quantization else {}
    processor = load_processor(folder, config)
    with quiet():
        model: Any = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            device_map={"": device},  # each tensor to its place as it is read: no copy in host memory
            trust_remote_code=False,
            **options,
        )
    model.name_or_path = model.config.name_or_path = name
    if quantized:
        prepare(model)
    return cls(model, processor)


def read_config(name: str, folder: Path) -> Any:
    """The configuration of the model in `folder`, which says that it comes from `name`. Raises ValueError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read a model configuration from {name!r}: {error}") from error


# ---- adapters ----


def base_of(source: Source, *, weights: bool = True) -> Source:
    """The base that an adapter names, found with or without its weights. The adapter is supported."""
    assert source.folder is not None
    directory, file = source.folder, source.folder / ADAPTER_FILE
    config = read_json(file, _PUT_BACK)
    check_adapter(config)
    full = [*directory.glob("model*.safetensors*"), *directory.glob("pytorch_model*.bin*")]
    if full:
        names = ", ".join(sorted(path.name for path in full))
        raise ValueError(
            f"{source.name!r} holds full weights and an adapter, of which one is stale: remove "
            f"{ADAPTER_FILE} and adapter_model.safetensors, or config.json and {names}"
        )
    saved = Settings.load(directory)
    base: str | None = config.get("base_model_name_or_path") or (saved.base if saved else None)
    remedy = f'write where it is into "base_model_name_or_path" of {file}'
    if not base:
        raise ValueError(f"the adapter in {source.name!r} names no base: {remedy}")
    own = directory / NANO_BASE
    if Path(base).name == NANO_BASE and own.is_dir():  # wherever the folder was when it was saved
        return Source("nano" if saved and saved.base == "nano" else os.path.abspath(own), own)
    if (Path(base) / ADAPTER_FILE).is_file():
        raise ValueError(
            f"the base {base!r} of the adapter in {source.name!r} is an adapter itself: merge it "
            f"into its base, and {remedy}"
        )
    try:
        found = find_model(base, weights=weights)
        if found.adapted:  # on the hub
            raise ValueError("it is an adapter itself")
        if found.folder is not None:
            read_config(found.name, found.folder)
    except (OSError, ValueError) as error:
        raise type(error)(
            f"the base {base!r} of the adapter in {source.name!r} cannot be opened: put it back, or "
            f"{remedy} ({error})"
        ) from None
    return found


def _put_adapter_on(backbone: Backbone, source: Source) -> None:
    from peft import PeftModel
    from peft.utils import load_peft_weights

    base = backbone.source
    try:
        model = PeftModel.from_pretrained(backbone.model, str(source.folder), is_trainable=True)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the LoRA adapter in {source.name!r} does not fit its base {base!r}: {error}"
        ) from error
    model.peft_config["default"].base_model_name_or_path = base
    backbone.model = model
    embeddings = ("embed_tokens.weight", "lm_head.weight", "base_layer.weight")
    backbone.adapter_has_embeddings = any(
        name.endswith(embeddings) for name in load_peft_weights(str(source.folder), device="cpu")
    )
