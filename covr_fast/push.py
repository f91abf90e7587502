"""`covr-fast push`: a run's VLM as a model on the Hugging Face Hub."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .checkpoint import newest_folder
from .errors import UserError, as_user_error
from .files import read_json
from .run_folder import RunFolder
from .vlm.model.card import card_for_hub
from .vlm.model.folder import ADAPTER_FILE, CARD_FILE, MODEL_FILES, NANO_BASE, SETTINGS_FILE
from .vlm.model.hub import is_hub_id
from .vlm.model.loading import Settings

_CONFIGS = (
    *(ADAPTER_FILE, SETTINGS_FILE, CARD_FILE, "config.json", "generation_config.json"),
    *("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"),
)
"""The files in which a path of this machine could be. The others are vocabularies and weights."""


@dataclass(frozen=True)
class Upload:
    """What will be on the hub."""

    files: dict[str, Path | bytes]
    """By name there: a file of the checkpoint, or the content if that is changed."""
    base: str | None
    """What an adapter needs: a hub id, or the folder of nano in `files`. None for full weights."""

    def sizes(self) -> dict[str, int]:
        """Bytes by name."""
        return {
            name: len(what) if isinstance(what, bytes) else what.stat().st_size
            for name, what in self.files.items()
        }


def prepare(run: Path, repo: str, base: str | None = None) -> Upload:
    """What `push` uploads of a run: its checkpoint/vlm, with names that hold everywhere instead of paths.

    Args:
        run: the run folder.
        repo: the name of the model on the hub.
        base: the hub id of the model that was tuned, where the run knows it by the path of a folder.

    Raises:
        UserError: there is no checkpoint, or no VLM that the run tuned; the adapter's base is a folder that
            nobody else has; `base` is no hub id, or the VLM is nano; another path of this machine is in a
            file.
    """
    folder = newest_folder(run / "checkpoint") / "vlm"
    if not folder.is_dir() and (method := _settings(run).get("method", "covr")) != "covr":
        raise UserError(f"{run} tuned no VLM (its method is {method}), so there is nothing to push")
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".tmp"  # what a killed process left
    }
    settings = Settings.load(folder)
    if settings is None:
        raise UserError(f"{folder} holds no {SETTINGS_FILE}: is it the folder of a run?")
    nano, was = settings.base == "nano", settings.base
    adapter = read_json(folder / ADAPTER_FILE, "put back a copy of it") if ADAPTER_FILE in files else None
    if adapter is not None and not nano:
        was = adapter.get("base_model_name_or_path") or was  # it may have been corrected there
    if base is not None and nano:
        raise UserError(f"--base {base} names another model than nano, on which the VLM of {run} is based")
    if base is not None and not is_hub_id(base):
        raise UserError(f"--base {base} must be the name of a model on the hub: OWNER/NAME")
    there = base or was
    needs: str | None = None
    if adapter is not None:
        if nano:
            needs = NANO_BASE if f"{NANO_BASE}/config.json" in files else "nano"  # older runs saved none
        elif is_hub_id(there):
            needs = there
        else:
            raise UserError(
                f"the VLM of {run} is an adapter of {there}, a folder of this machine that nobody else has: "
                "--base OWNER/NAME says which model on the hub that is"
            )
        files[ADAPTER_FILE] = _as_json(adapter | {"base_model_name_or_path": needs})
    elif not nano and not is_hub_id(there):
        there = repo  # full weights need no base, and a path says nothing elsewhere
    files[SETTINGS_FILE] = _as_json(asdict(replace(settings, base=there)))
    if CARD_FILE in files:
        card = (folder / CARD_FILE).read_text()
        files[CARD_FILE] = card_for_hub(card, repo, was, base or was).encode()
    for name in _CONFIGS:
        if name in files and (path := _own_path(name, _content(files[name]), run)):
            raise UserError(f"{folder / name} contains the path {path} of this machine: remove it there")
    return Upload(files, needs)


def _settings(run: Path) -> dict[str, Any]:
    path = run / "config.json"
    return read_json(path, "put back a copy of it") if path.is_file() else {}


def push(
    run: Path, repo: str, *, private: bool = False, base: str | None = None, dry_run: bool = False
) -> tuple[str, Upload]:
    """Makes a run's VLM a model on the hub, in one commit, and returns its address and what was uploaded.

    What was there under the names of a model's files is replaced; other files stay.

    Args:
        run: the run folder. It must not be training.
        repo: NAME or OWNER/NAME. It is made if it does not exist.
        private: make it private; a model that exists stays as it is.
        base: see `prepare`.
        dry_run: check all, and make and upload nothing.

    Raises:
        UserError: see `prepare`; nobody is logged in; the hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token

    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", repo):
        raise UserError(f"{repo!r} is no name of a model: give NAME or OWNER/NAME")
    with RunFolder(run).claimed(resume=True), as_user_error():
        upload = prepare(run, repo, base)
        if dry_run:
            return f"{constants.ENDPOINT}/{repo}", upload
        if constants.HF_HUB_OFFLINE:
            raise UserError("HF_HUB_OFFLINE=1 forbids to use the hub: unset it to push")
        token = get_token()
        if token is None:
            raise UserError("you are not logged in to the hub: run 'hf auth login', or set HF_TOKEN")
        api = HfApi(token=token)
        try:
            repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
            upload = prepare(run, repo, base)  # the hub knows the owner
            there = api.list_repo_files(repo)
            stale = [name for name in there if _of_model(name) and name not in upload.files]
            address = api.create_commit(
                repo,
                # One commit: who downloads at any moment gets the old or the new model.
                [CommitOperationDelete(name) for name in stale]
                + [CommitOperationAdd(name, what) for name, what in upload.files.items()],
                commit_message="The VLM of a run of covr_fast",
            ).repo_url
        except UserError:
            raise
        except Exception as error:  # of huggingface_hub, its HTTP library or the system
            reason = " ".join(str(error).split()).replace(token, "TOKEN") or type(error).__name__
            raise UserError(f"{repo!r} was not pushed to {constants.ENDPOINT}: {reason}") from error
    return str(address), upload


def _of_model(name: str) -> bool:
    """Whether a file on the hub has the name of a model's file, so that another model replaces it."""
    return name.startswith(f"{NANO_BASE}/") or any(fnmatch(name, pattern) for pattern in MODEL_FILES)


def _as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _content(what: Path | bytes) -> str:
    return (what if isinstance(what, bytes) else what.read_bytes()).decode()


def _own_path(name: str, text: str, run: Path) -> str | None:
    """A path of this machine in a file, if there is one."""
    if name == CARD_FILE:
        own = [str(run.resolve()), str(Path.home())]
        return next((path for path in own if path != os.sep and path in text), None)
    return next((value for value in _strings(json.loads(text)) if _is_path_here(value)), None)


def _is_path_here(value: str) -> bool:
    return value.startswith(os.sep) and "\n" not in value and len(Path(value).parts) > 2


def _strings(content: Any) -> Iterator[str]:
    """All text in the values of a JSON document."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for each in content.values() if isinstance(content, dict) else content:
            yield from _strings(each)
