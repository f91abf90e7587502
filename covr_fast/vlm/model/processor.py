"""A model's processor (chat template, tokenizer, image processor), without its video half.

Video processors need torchvision, which frames do not. Where a processor has one, its class is used with None
in that place. Text and images are processed as before, and the settings for videos are saved as they were.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VIDEO = "video_processor"


def load_processor(folder: str | Path, config: Any) -> Any:
    """The processor of the checkpoint in `folder`, whose model has the configuration `config`."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    # A checkpoint may name code of its own, which is never run.
    options: dict[str, Any] = {"pretrained_model_name_or_path": folder, "trust_remote_code": False}
    try:
        with quiet():
            cls: Any = PROCESSOR_MAPPING[type(config)]
            # Where torchvision is installed, it would resize the frames by default, with other results.
            images = AutoImageProcessor.from_pretrained(**options, backend="pil")
            if VIDEO not in cls.get_attributes():
                processor = AutoProcessor.from_pretrained(**options)
                processor.image_processor = images
                return processor
            parts: dict[str, Any] = {
                "image_processor": images,
                "tokenizer": AutoTokenizer.from_pretrained(**options),
                VIDEO: None,
            }
            settings, _ = cls.get_processor_dict(folder)
            settings.setdefault("chat_template", parts["tokenizer"].chat_template)
            arguments = [parts[name] for name in cls.get_attributes()]
            video = settings.get(VIDEO) or _video_settings(Path(folder))
            return _without_video(cls, video).from_args_and_dict(arguments, settings)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"cannot open the processor of {str(folder)!r}: {error}") from error


def _video_settings(folder: Path) -> dict[str, Any]:
    """The settings for videos in a separate file; empty if there is no such file."""
    file = folder / "video_preprocessor_config.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _without_video(cls: Any, video: dict[str, Any]) -> Any:
    """A subclass of the processor class `cls` that takes None as video processor and saves `video` for it."""

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
def quiet() -> Iterator[None]:
    """Hides transformers' progress bars and its warnings, such as those of a missing torchvision."""
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
