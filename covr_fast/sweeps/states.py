"""How far the runs of a sweep are, as their folders say."""

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path

from ..checkpoint import has_checkpoint
from ..errors import UserError
from ..files import full_names, read_json, read_records
from ..report import read_summary
from .spec import PlannedRun

_MAY_DIFFER = {"threads", "env.server"}
"""Settings that do not make a finished run another one."""
_TAIL = 8
"""Last lines of its log that are shown of a run that died."""


class State(Enum):
    """Of a run."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    BROKEN = "broken"
    ELSEWHERE = "another process writes it"


@dataclass
class SweepRun:
    """A run of a sweep and its folder."""

    planned: PlannedRun
    folder: Path
    state: State = State.WAITING
    exit_code: int | None = None

    @property
    def log(self) -> Path:
        """What the process prints."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def group(self) -> tuple[str, str]:
        """Its preset, and its group in that."""
        return self.planned.preset, self.planned.group

    @property
    def name(self) -> str:
        return str(self.planned.place)

    def has_ended(self) -> bool:
        """Whether its folder holds a finished run, also if only its video could not be written after that."""
        return (self.folder / "summary.json").is_file()

    def step(self) -> int:
        """Environment steps that the run has logged."""
        try:
            records, _ = read_records(self.folder / "metrics.jsonl")
        except UserError:
            return 0
        return int(records[-1]["step"]) if records else 0

    @cached_property
    def result(self) -> tuple[float, float, float]:
        """Mean and standard deviation of the returns of a finished run's policy, and its seconds."""
        summary = read_summary(self.folder)
        result = summary["evaluations"][summary["policy"]]
        return result["mean"], result["std"], summary["seconds"]

    def last_lines(self) -> list[str]:
        """The end of the log."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError:
            return []
        return [line for line in lines if line.strip()][-_TAIL:]


def find_runs(planned: list[PlannedRun], out: Path) -> list[SweepRun]:
    """The runs with the state in which their folders are.

    Raises:
        UserError: a folder holds a run with other settings.
    """
    runs = [SweepRun(each, out / each.place) for each in planned]
    for run in runs:
        kept = has_checkpoint(run.folder) or run.has_ended()
        if kept and (run.folder / "config.json").is_file():
            _check_same(run)
        if run.has_ended():
            run.state = State.FINISHED
    return runs


def _check_same(run: SweepRun) -> None:
    """Raises a UserError if the run in the folder has other settings than the spec asks for."""
    had = full_names(read_json(run.folder / "config.json", "put back a copy of it, or remove the run"))
    # As it would be written: JSON has no tuples.
    asked = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in full_names(run.planned.config.to_dict()).items()
    }
    differing = [n for n in asked if n not in _MAY_DIFFER and n in had and had[n] != asked[n]]
    if differing:
        first = differing[0]
        raise UserError(
            f"{run.folder} holds a run with {first}={had[first]}, and the sweep asks for {asked[first]}: "
            "choose another --out, or remove that run"
        )
