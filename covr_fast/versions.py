"""The weights of the VLM after each round, kept in RUN/checkpoint/adapters/round-N.

Version 0 is the VLM with which the run began, and each published round makes the next version. Priors are
stored with the version of the weights that gave them, so `covr-fast audit` can ask the same weights again.

A checkpoint contains the weights of all rounds before it. Those of the last round are the ones that it saves
as vlm/; earlier rounds come from the checkpoint that it replaces. Both are hard links: nothing is copied. If
no checkpoint has the weights of a round when the next round replaces them, they are written to RUN/.rounds
(`stage`), from where the next checkpoint takes them. A run that is resumed does all rounds after its
checkpoint again, so what was staged after it is dropped.
"""

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import UserError
from .files import read_json, write_whole, writing
from .vlm.model.folder import name_nano_base

if TYPE_CHECKING:
    from .vlm import ActionPrior

LARGEST_FULL = 100_000_000
"""Bytes of a model that is fully tuned up to which its weights are kept after each round. Adapters always
are."""
_STAGED = ".rounds"
_RECORD = "round.json"


class RoundWeights(NamedTuple):
    """What `ActionPrior.from_pretrained` opens as the VLM after a round."""

    number: int
    """Of the round; 0: before any."""
    version: int
    """Of the weights, as in the column "prior_version" of the replay buffer."""
    model: str | Path
    """A folder; for round 0 what vlm.model says."""


def last_published(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Of the records of rounds, that of the last one that changed the weights. None: none did."""
    return next((record for record in reversed(records) if "version" in record), None)


def are_kept(prior: "ActionPrior") -> bool:
    """Whether the weights are kept after each round: adapters, and small models."""
    if prior.backbone.adapted:
        return True
    nbytes: int = sum(p.numel() * p.element_size() for p in prior.backbone.model.parameters())
    return nbytes <= LARGEST_FULL


def rounds_in(adapters: Path) -> list[RoundWeights]:
    """The rounds whose weights are kept in this folder of a checkpoint, in their order.

    Raises:
        UserError: a record is damaged.
    """
    found = []
    for folder in _folders(adapters):
        record = read_json(folder / _RECORD, remedy := "put back a copy of the checkpoint")
        try:
            found.append(RoundWeights(int(record["round"]), int(record["version"]), folder))
        except (KeyError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
            raise UserError(f"{folder / _RECORD} is damaged ({why}): {remedy}") from error
    return sorted(found)


def save_vlm(prior: "ActionPrior", folder: Path, final: Path) -> None:
    """Writes the VLM for `ActionPrior.from_pretrained` into `folder`, which will be moved to `final`.

    Raises:
        OSError: it could not be written.
    """
    from safetensors import SafetensorError

    try:
        prior.save_pretrained(folder)
        name_nano_base(folder, final)
    except SafetensorError as error:  # what safetensors raises for a failed write
        raise OSError(errno.EIO, str(error), str(folder)) from error


def stage(run: Path, record: Mapping[str, Any], prior: "ActionPrior") -> None:
    """Writes the weights of the round of `record`, which `prior` still has, unless the run's checkpoint has
    them.

    Raises:
        OSError: they could not be written; no part of them is left.
    """
    name = _name(record)
    if not are_kept(prior) or (run / "checkpoint" / "adapters" / name).is_dir():
        return
    folder = run / _STAGED / name
    try:
        save_vlm(prior, folder, run / "checkpoint" / "adapters" / name)
        _write_record(record, folder)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def add_rounds(
    new: Path, run: Path, before: Path | None, records: Sequence[Mapping[str, Any]], prior: "ActionPrior"
) -> None:
    """Fills new/adapters, where `new` is a checkpoint of `run` whose vlm/ is written: with the last round of
    `records`, the staged ones, and those of the checkpoint `before`.

    Raises:
        OSError: it could not be written.
    """
    last = last_published(records)
    if last is not None and are_kept(prior):
        _link(new / "vlm", new / "adapters" / _name(last))
        _write_record(last, new / "adapters" / _name(last))
    for parent in (run / _STAGED, *([before / "adapters"] if before else [])):
        for folder in _folders(parent):
            if not (target := new / "adapters" / folder.name).exists():
                _link(folder, target)


def drop_staged(run: Path) -> None:
    """Removes the staged rounds: a checkpoint has them, or they will be done again."""
    shutil.rmtree(run / _STAGED, ignore_errors=True)


def _name(record: Mapping[str, Any]) -> str:
    return f"round-{record['round']}"


def _write_record(record: Mapping[str, Any], folder: Path) -> None:
    content = {name: record[name] for name in ("round", "version", "published")}
    write_whole(folder / _RECORD, json.dumps(content) + "\n")


def _folders(parent: Path) -> list[Path]:
    """The whole ones: the record is written last."""
    return [path.parent for path in parent.glob(f"round-*/{_RECORD}")]


def _link(source: Path, target: Path) -> None:
    """Makes the folder `target` with links to the files in `source`, or copies where links are impossible."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_dir():
            _link(path, target / path.name)
            continue
        try:
            os.link(path, target / path.name)
        except OSError:
            with writing(target / path.name):
                shutil.copyfile(path, target / path.name)
