"""The folder of a saved model: the model is replaced as a whole, other files in the folder stay."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

SETTINGS_FILE = "action_prior.json"
ADAPTER_FILE = "adapter_config.json"
CARD_FILE = "README.md"
CARD_TAG = "covr_fast"
"""A tag in the header of every model card that is written here."""
NANO_BASE = "nano_base"
"""Folder beside an adapter of nano: its base, for tools that cannot make nano from a seed."""

MODEL_FILES = (
    *(SETTINGS_FILE, "config.json", "generation_config.json"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"),
    *(ADAPTER_FILE, "adapter_model.safetensors", "adapter_model.bin"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)
"""The files that transformers, peft and `ActionPrior.save_pretrained` write. Another model replaces them."""


@contextmanager
def replaced_model(folder: Path) -> Iterator[Path]:
    """A new folder to write into. It replaces `folder` when the block ends without an error.

    The model in `folder` is deleted; files that belong to no model stay. A README.md among them (one without
    the header of a model card) takes the place of the new model's. If the process ends at any moment, either
    the old or the new model is there and complete (`model_folder` finds it).

    Raises:
        FileExistsError: `folder` is a file, or contains a file that belongs to no model but has the name of
            a file of the new model. Nothing has changed then.
        OSError: the system cannot replace this folder.
    """
    folder = Path(os.path.realpath(folder))  # a link to a folder stays a link
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give the name of a folder")
    if same_folder(folder, Path()):
        raise _irreplaceable(folder, OSError(errno.EBUSY, "it is the working directory"))
    new, old = folder.parent / f".{folder.name}.new", _old(folder)
    try:
        _settle(folder)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    except OSError as error:
        if folder.exists():
            raise _irreplaceable(folder, error) from error
        raise
    try:
        yield new
        if folder.exists():
            for path in list(new.iterdir()):
                taken = folder / path.name
                if taken.exists() and not _of_model(taken):
                    if path.name == CARD_FILE:
                        path.unlink()
                        continue
                    remedy = "move it away, or save into another folder"
                    raise FileExistsError(f"{taken} belongs to no model: {remedy}")
            shutil.copymode(folder, new)
            try:
                os.replace(folder, old)
            except OSError as error:  # for example a mounted folder
                raise _irreplaceable(folder, error) from error
        os.replace(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        _settle(folder)
        raise
    _settle(folder)


def model_folder(model: str | Path) -> str | Path:
    """`model`, or the folder to which an interrupted `replaced_model` has moved the model of this folder."""
    folder = Path(model)
    return model if folder.exists() or not _old(folder).is_dir() else _old(folder)


def same_folder(a: Path, b: Path) -> bool:
    return a.is_dir() and b.is_dir() and a.samefile(b)


def _old(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.old"


def _settle(folder: Path) -> None:
    """Finishes an interrupted `replaced_model`: moves the old folder back, or other files out of it."""
    old = _old(folder)
    if not old.is_dir():
        return
    if not folder.exists():
        os.replace(old, folder)
        return
    for path in old.iterdir():
        if not _of_model(path) and not (folder / path.name).exists():
            os.replace(path, folder / path.name)
    shutil.rmtree(old, ignore_errors=True)


def _of_model(path: Path) -> bool:
    if path.name == "config.json":  # other programs have a config.json too
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError):
            return False
        return isinstance(config, dict) and "model_type" in config
    if path.name == CARD_FILE:
        return _is_model_card(path)
    if path.name == NANO_BASE:
        return path.is_dir() and _of_model(path / "config.json")
    return any(fnmatch(path.name, pattern) for pattern in MODEL_FILES)


def name_nano_base(folder: Path, final: Path) -> None:
    """Lets the adapter of nano in `folder` name its base as other tools need it: by the path that it has when
    the folder has been moved to `final`. Does nothing to other models."""
    file = folder / ADAPTER_FILE
    if (folder / NANO_BASE).is_dir() and file.is_file():
        config = json.loads(file.read_text())
        config["base_model_name_or_path"] = os.path.abspath(final / NANO_BASE)
        file.write_text(json.dumps(config, indent=2) + "\n")


def _is_model_card(path: Path) -> bool:
    """Whether a README.md begins with a header that names the library of a model."""
    try:
        text = path.read_text()
    except (OSError, ValueError):
        return False
    header = text.removeprefix("---\n").partition("\n---\n")[0] if text.startswith("---\n") else ""
    return any(line.startswith("library_name:") for line in header.splitlines())


def _irreplaceable(folder: Path, error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"the folder {folder} cannot be replaced ({error.strerror}): save into a new folder inside it",
    )
