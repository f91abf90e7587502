"""Models on the Hugging Face Hub, as folders of its cache on this machine.

A model is looked up once and its files are then opened from that folder, so a machine without internet waits
for no connection and errors say what to download.
"""

import json
from pathlib import Path

from .folder import MODEL_FILES, NANO_BASE

_WANTED = [*MODEL_FILES, "additional_chat_templates/*", f"{NANO_BASE}/*", "README.md"]
_PICKLES = ["pytorch_model*", "adapter_model.bin"]
"""The older format of weights. It is downloaded only from models that have no other."""
_WEIGHTS = [*_PICKLES, "*.safetensors"]


def is_hub_id(model: str) -> bool:
    """Whether this is `owner/name` and not a path."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and not model.endswith("/")


def hub_folder(repo: str, *, weights: bool = True) -> Path:
    """The folder with the files of a model on the hub, with or without its weights. What is missing or out of
    date is downloaded; without a connection the version that was downloaded last is taken.

    Raises:
        PermissionError: the model is gated, and its terms have not been accepted.
        FileNotFoundError: the hub has no such model, or it was not downloaded and the hub cannot be reached.
        OSError: a download failed.
    """
    if not weights:
        return _download(repo, ignore=_WEIGHTS)
    folder = _download(repo, ignore=_PICKLES)
    if _lacks_weights(folder):
        folder = _download(repo, ignore=[])
    if _lacks_weights(folder):
        raise FileNotFoundError(f"the copy of {repo!r} in {folder} is incomplete: {_remedy(repo)}")
    return folder


def _download(repo: str, ignore: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=_WANTED, ignore_patterns=ignore))
    except GatedRepoError:
        raise PermissionError(
            f"{repo!r} is gated: accept its terms on {constants.ENDPOINT}/{repo}, and log in with "
            "'hf auth login'"
        ) from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{constants.ENDPOINT} has no model {repo!r}, or it is private: check the name, or log in with "
            "'hf auth login'"
        ) from None
    except LocalEntryNotFoundError as error:
        if partial := getattr(error, "snapshot_path", None):
            return Path(partial)  # what is missing there may not be needed, such as the model card
        why = (
            "HF_HUB_OFFLINE=1 forbids to download it"
            if constants.HF_HUB_OFFLINE
            else f"{constants.ENDPOINT} cannot be reached"
        )
        raise FileNotFoundError(
            f"{repo!r} is no folder here and not in the cache {constants.HF_HUB_CACHE} (HF_HOME names "
            f"another), and {why}: "
            f"{_remedy(repo)}"
        ) from None
    except Exception as error:  # also of the HTTP library, which differs between versions of huggingface_hub
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{repo!r} could not be downloaded ({reason}): start again to continue") from error


def _remedy(repo: str) -> str:
    name = repo.rpartition("/")[2]
    return (
        f"run 'hf download {repo} --local-dir {name}' on a machine with internet, copy the folder here, and "
        f"give it as the model (--vlm.model {name})"
    )


def _lacks_weights(folder: Path) -> bool:
    """Whether weights are missing: all, or some of several files."""
    names = {path.name for path in folder.iterdir() if path.exists()}  # not links to blobs that are gone
    for index in names & {"model.safetensors.index.json", "pytorch_model.bin.index.json"}:
        if set(json.loads((folder / index).read_text())["weight_map"].values()) <= names:
            return False
    single = {"model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin"}
    return not names & single
