"""Opening checkpoints: `nano`, a directory, or a hub id; full weights, or a LoRA adapter on a base."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .attention import choose_attention
from .backbones import Backbone, backbone_class
from .nano import write_nano

SETTINGS_FILE = "action_prior.json"
ADAPTER_FILE = "adapter_config.json"


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

    def save(self, directory: Path) -> None:
        (directory / SETTINGS_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "Settings | None":
        file = directory / SETTINGS_FILE
        return cls(**json.loads(file.read_text())) if file.is_file() else None


def load_backbone(
    model: str | Path,
    *,
    seed: int,
    attention: str,
    dtype: torch.dtype | None,
    device: torch.device,
    quantization: Any = None,
) -> Backbone:
    """Loads model and processor of `model`, a LoRA adapter in it included.

    Raises:
        FileNotFoundError: `model` looks like a path and does not exist.
        ValueError: the architecture is not supported, the attention cannot run here, or an adapter does not
            fit its base.
    """
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    attention = choose_attention(attention, device, dtype)
    options = {"dtype": dtype, "device": device, "attention": attention, "quantization": quantization}
    adapter = Path(model) / ADAPTER_FILE
    if adapter.is_file():
        settings = Settings.load(adapter.parent)
        if settings is not None:
            base, seed = settings.base, settings.seed
        else:
            base = json.loads(adapter.read_text())["base_model_name_or_path"]
        return _with_adapter(_load_base(base, seed, **options), adapter.parent, base)
    return _load_base(str(model), seed, **options)


def _load_base(source: str, seed: int, **options: Any) -> Backbone:
    """Full weights: nano, a directory or a hub id."""
    if source != "nano":
        # A hub id is `owner/name`; anything else that is not a directory is a mistyped path.
        if not Path(source).is_dir() and (source.startswith((".", "/", "~")) or source.count("/") != 1):
            raise FileNotFoundError(
                f"no model directory at {source!r}; give 'nano', a checkpoint directory or a hub id"
            )
        return _load_checkpoint(source, **options)
    with tempfile.TemporaryDirectory() as directory, _quiet():
        write_nano(directory, seed=seed)
        backbone = _load_checkpoint(directory, **options)
    backbone.base.name_or_path = backbone.base.config.name_or_path = "nano"  # the directory is gone
    return backbone


def _load_checkpoint(
    source: str, *, dtype: torch.dtype, device: torch.device, attention: str, quantization: Any
) -> Backbone:
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read a model configuration from {source!r}: {error}") from error
    cls = backbone_class(config.model_type)
    processor = load_processor(source, config)
    with _quiet():
        model: Any = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=attention,
            quantization_config=quantization,
            device_map=None if quantization is None else {"": device},
        )
    if quantization is None:
        model = model.to(device)
    return cls(model.eval(), processor)


def _with_adapter(backbone: Backbone, directory: Path, base: str) -> Backbone:
    from peft import PeftModel

    try:
        model = PeftModel.from_pretrained(backbone.model, directory, is_trainable=True)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the LoRA adapter in {str(directory)!r} does not fit its base {base!r}: {error}"
        ) from error
    return type(backbone)(model.eval(), backbone.processor)


def load_processor(source: str, config: Any) -> Any:
    """The model's own processor, without its video half.

    Video processors need torchvision, which frames do not. Where a processor has one, the class is used with
    None in its place; what it does with text and images is unchanged.
    """
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    with _quiet():
        cls: Any = PROCESSOR_MAPPING[type(config)]
        if "video_processor" not in cls.get_attributes():
            return AutoProcessor.from_pretrained(source)
        parts: dict[str, Any] = {
            "image_processor": AutoImageProcessor.from_pretrained(source),
            "tokenizer": AutoTokenizer.from_pretrained(source),
            "video_processor": None,
        }
        settings, _ = cls.get_processor_dict(source)
        settings.setdefault("chat_template", parts["tokenizer"].chat_template)
        arguments = [parts[name] for name in cls.get_attributes()]
        return _without_video(cls).from_args_and_dict(arguments, settings)


def _without_video(cls: Any) -> Any:
    def check_argument_for_proper_class(self: Any, name: str, argument: Any) -> Any:
        if name == "video_processor" and argument is None:
            return None
        return cls.check_argument_for_proper_class(self, name, argument)

    return type(cls.__name__, (cls,), {"check_argument_for_proper_class": check_argument_for_proper_class})


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
