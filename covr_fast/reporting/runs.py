"""Runs as a report reads them: of any version, finished, unfinished or damaged."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ..config import TrainConfig
from ..errors import UserError
from ..files import full_names, read_json, read_records
from ..report import SUMMARY_PARTS

DEPLOYED = ("actor", "vlm_after", "vlm_before")
"""The evaluations that may be a run's outcome, the first that it has: without an agent that is the VLM's."""


class Final(NamedTuple):
    """What a finished run came to: the return of its evaluation episodes."""

    policy: str
    """One of DEPLOYED."""
    mean: float
    std: float
    episodes: int


@dataclass(frozen=True)
class Run:
    """A run folder that could be read."""

    folder: Path
    settings: dict[str, Any]
    """By full names, those of config.json; the defaults where an older version had no such setting."""
    summary: dict[str, Any]
    """summary.json; empty if the run is not finished."""
    metrics: list[dict[str, Any]]
    """The lines of metrics.jsonl, oldest first."""
    torn: bool = False
    """Whether the last line of metrics.jsonl is incomplete and was left out."""
    lacks: list[str] = field(default_factory=list)
    """Files and fields that it should have, and has not."""

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @property
    def env_id(self) -> str:
        return str(self.settings.get("env.id", self.summary.get("environment", "-")))

    @property
    def preset(self) -> str:
        return str(self.settings.get("begun_as", ""))

    @property
    def kind(self) -> str:
        return str(self.settings.get("agent.kind", "-"))

    @property
    def method(self) -> str:
        return str(self.settings.get("method", "covr"))

    @property
    def model(self) -> str:
        return str(self.settings.get("vlm.model", "-"))

    @property
    def seed(self) -> int | None:
        return self.settings.get("seed", self.summary.get("seed"))

    @property
    def steps(self) -> int:
        """Environment steps that it has made, as far as it says."""
        return int(self.summary.get("steps", max((m["step"] for m in self.metrics), default=0)))

    @cached_property
    def evaluations(self) -> dict[str, Final]:
        """By policy, the last evaluation of each."""
        found = {}
        for name, e in self.summary.get("evaluations", {}).items():
            found[name] = Final(name, e["mean"], e["std"], len(e["returns"]))
        return found

    @property
    def final(self) -> Final | None:
        return next((self.evaluations[name] for name in DEPLOYED if name in self.evaluations), None)

    @property
    def rounds(self) -> list[dict[str, float]]:
        """The records of its fine-tuning rounds."""
        return list(self.summary.get("rounds", []))


class Broken(NamedTuple):
    """A run folder that cannot be read."""

    folder: Path
    problem: str


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run folders that are given or lie below folders that are given, each once, in this order; those of
    one folder by name.

    Raises:
        UserError: a path is no folder, or neither a run folder nor above one.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is not the folder of a run, nor one above: there is no such folder")
        below = _runs_below(path)
        if not below:
            raise UserError(
                f"{path} holds no run (no metrics.jsonl): give the folder of a run, or one above run folders"
            )
        for run in below:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _runs_below(path: Path) -> list[Path]:
    runs = []
    for folder, below, files in os.walk(path):
        below.sort(key=_natural)
        if "metrics.jsonl" in files or ("config.json" in files and _has_settings(Path(folder))):
            runs.append(Path(folder))
            below.clear()  # a run's own folders hold models
    return runs


def _natural(name: str) -> list[int | str]:
    """A key that sorts m2 before m10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _has_settings(folder: Path) -> bool:
    """Whether config.json there is a run's, and not, for example, a model's."""
    try:
        return isinstance(json.loads((folder / "config.json").read_text()).get("env"), dict)
    except (OSError, ValueError, AttributeError):
        return False


def default_settings() -> dict[str, Any]:
    """By full names, in JSON's types."""
    return full_names(json.loads(json.dumps(TrainConfig().to_dict())))


def read_run(folder: Path) -> Run | Broken:
    """Reads a run folder of any version."""
    try:
        return _read(folder)
    except UserError as error:
        return Broken(folder, str(error))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return Broken(folder, f"a file is not what a run writes ({type(error).__name__}: {error})")


def _read(folder: Path) -> Run:
    lacks = []
    settings: dict[str, Any] = {}
    if (path := folder / "config.json").is_file():
        settings = default_settings() | full_names(read_json(path, "put back a copy of it"))
    else:
        lacks.append("config.json")
    metrics: list[dict[str, Any]] = []
    torn = False
    if (path := folder / "metrics.jsonl").is_file():
        metrics, torn = read_records(path)
    else:
        lacks.append("metrics.jsonl")
    summary: dict[str, Any] = {}
    if (path := folder / "summary.json").is_file():
        summary = read_json(path, f"covr-fast train PRESET --resume {folder} writes it again")
        missing = sorted(SUMMARY_PARTS - summary.keys())
        lacks += [f"{name} in summary.json" for name in missing]
    run = Run(folder, settings, summary, metrics, torn, lacks)
    if run.final is not None and not math.isfinite(run.final.mean):
        raise UserError(f"{folder / 'summary.json'}: the mean return of {run.final.policy} is not finite")
    if summary and run.final is None:
        lacks.append("an evaluation of what it trained")
    return run
