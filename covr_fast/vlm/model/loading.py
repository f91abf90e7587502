"""Opening checkpoints: `nano`, a directory, or a hub id; full weights, or a LoRA adapter on a base."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...files import read_json
from .attention import choose_attention
from .backbones import Backbone, backbone_class
from .folder import ADAPTER_FILE, SETTINGS_FILE
from .nano import write_nano
from .quantized import bitsandbytes_config, check_own_quantization, prepare

VIDEO = "video_processor"
_PUT_BACK = "put back a copy of it, or save the prior anew"


@dataclass(frozen=True)
class Settings:
    """What a saved prior needs besides the checkpoint; written to `action_prior.json`."""

    base: str
    """Where the weights without adapter come from: "nano", a directory or a hub id."""
    seed: int
    """Of nano's random weights; unused otherwise."""
    action_dim: int
    decimals: int
    prompt: str | None
    dtype: str | None = None
    """Of the weights, such as "bfloat16"; None: as the device has them."""
    quantization: dict[str, Any] | None = None
    """How the base is quantized when it is loaded: see `quantized.quantization_settings`."""

    def save(self, directory: Path) -> None:
        (directory / SETTINGS_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "Settings | None":
        """None where a directory has none.

        Raises:
            ValueError: they are damaged.
        """
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
    """Loads model and processor of `model`, a LoRA adapter in it included.

    Args:
        quantization: from `quantized.quantization_settings`; None takes the weights as they come.

    Raises:
        FileNotFoundError: `model`, or an adapter's base, looks like a path and does not exist.
        ValueError: the architecture is not supported, the attention cannot run here, an adapter does not fit
            its base, or quantized weights cannot be had as they are asked for.
    """
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    attention = choose_attention(attention, device, dtype)
    options = {"dtype": dtype, "device": device, "attention": attention, "quantization": quantization}
    adapter = Path(model) / ADAPTER_FILE
    if str(model) == "nano" or not adapter.is_file():
        return _load_base(str(model), seed, **options)
    full = [*Path(model).glob("model*.safetensors*"), *Path(model).glob("pytorch_model*.bin*")]
    if full:
        weights = ", ".join(sorted(path.name for path in full))
        raise ValueError(
            f"{str(model)!r} holds full weights and an adapter, of which one is stale: remove "
            f"{ADAPTER_FILE} and adapter_model.safetensors, or config.json and {weights}"
        )
    settings = Settings.load(adapter.parent)
    seed = seed if settings is None else settings.seed
    base = _base_of(adapter, settings)
    return _with_adapter(_load_base(base, seed, **options), adapter.parent, base)


def _base_of(adapter: Path, settings: Settings | None) -> str:
    """The base that an adapter's configuration names, which is there."""
    config = read_json(adapter, _PUT_BACK)
    base = config.get("base_model_name_or_path") or (settings and settings.base)
    remedy = f'write where it is into "base_model_name_or_path" of {adapter}'
    if not base:
        raise ValueError(f"the adapter in {str(adapter.parent)!r} names no base: {remedy}")
    if (Path(base) / ADAPTER_FILE).is_file():
        raise ValueError(
            f"the base {base!r} of the adapter in {str(adapter.parent)!r} is an adapter itself: merge it "
            f"into its base, and {remedy}"
        )
    if base == "nano":
        return base
    try:
        _read_config(base)
    except (FileNotFoundError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(
            f"the base {base!r} of the adapter in {str(adapter.parent)!r} cannot be opened: put it back, or "
            f"{remedy} ({error})"
        ) from error
    return base


def _load_base(source: str, seed: int, **options: Any) -> Backbone:
    """Full weights: nano, a directory or a hub id."""
    if source != "nano":
        # A relative path would mean another directory when an adapter of this base is opened elsewhere.
        return _load_checkpoint(os.path.abspath(source) if Path(source).is_dir() else source, **options)
    with tempfile.TemporaryDirectory() as directory, _quiet():
        write_nano(directory, seed=seed)
        backbone = _load_checkpoint(directory, **options)
    backbone.base.name_or_path = backbone.base.config.name_or_path = "nano"  # the directory is gone
    return backbone


def _read_config(source: str) -> Any:
    from transformers import AutoConfig

    # A hub id is `owner/name`; anything else that is not a directory is a mistyped path.
    if not Path(source).is_dir() and (source.startswith((".", "/", "~")) or source.count("/") != 1):
        raise FileNotFoundError(
            f"no model directory at {source!r}; give 'nano', a checkpoint directory or a hub id"
        )
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read a model configuration from {source!r}: {error}") from error


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
    with _quiet():
        model: Any = AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype, attn_implementation=attention, **options
        )
    if quantized:
        prepare(model)
    else:
        model = model.to(device)
    return cls(model.eval(), processor)


def _with_adapter(backbone: Backbone, directory: Path, base: str) -> Backbone:
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
    adapted = type(backbone)(model.eval(), backbone.processor)
    embeddings = ("embed_tokens.weight", "lm_head.weight", "base_layer.weight")
    adapted.adapter_has_embeddings = any(
        name.endswith(embeddings) for name in load_peft_weights(str(directory), device="cpu")
    )
    return adapted


def load_processor(source: str, config: Any) -> Any:
    """The model's own processor, without its video half.

    Video processors need torchvision, which frames do not. Where a processor has one, the class is used with
    None in its place; what it does with text and images is unchanged, and the video half's settings are saved
    with it as they were found.

    Raises:
        ValueError: files of it are missing or damaged.
    """
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    try:
        with _quiet():
            cls: Any = PROCESSOR_MAPPING[type(config)]
            if VIDEO not in cls.get_attributes():
                return AutoProcessor.from_pretrained(source)
            parts: dict[str, Any] = {
                "image_processor": AutoImageProcessor.from_pretrained(source),
                "tokenizer": AutoTokenizer.from_pretrained(source),
                VIDEO: None,
            }
            settings, _ = cls.get_processor_dict(source)
            settings.setdefault("chat_template", parts["tokenizer"].chat_template)
            arguments = [parts[name] for name in cls.get_attributes()]
            video = settings.get(VIDEO) or _video_settings(source)
            return _without_video(cls, video).from_args_and_dict(arguments, settings)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"cannot open the processor of {source!r}: {error}") from error


def _video_settings(source: str) -> dict[str, Any]:
    """What a file of its own says of the video half, if there is one."""
    from transformers.utils import VIDEO_PROCESSOR_NAME, cached_file

    file = cached_file(source, VIDEO_PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False)
    return {} if file is None else json.loads(Path(file).read_text())


def _without_video(cls: Any, video: dict[str, Any]) -> Any:
    def check_argument_for_proper_class(self: Any, name: str, argument: Any) -> Any:
        if name == VIDEO and argument is None:
            return None
        return cls.check_argument_for_proper_class(self, name, argument)

    def to_dict(self: Any) -> dict[str, Any]:
        settings = {name: value for name, value in cls.to_dict(self).items() if name != VIDEO}
        return settings | ({VIDEO: video} if video else {})

    def save_pretrained(self: Any, directory: str | Path) -> None:
        parts = [name for name in cls.get_attributes() if name != VIDEO]
        self.get_attributes = lambda: parts
        try:
            cls.save_pretrained(self, directory)
        finally:
            del self.get_attributes

    methods = (check_argument_for_proper_class, to_dict, save_pretrained)
    return type(cls.__name__, (cls,), {method.__name__: method for method in methods})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides transformers' progress bars and its notes on missing torchvision while something small loads."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
