"""Runs by task, and within a task by what was tried: a group is what differs in the seed alone."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..paper import TASKS, PaperTask
from .runs import Broken, Run, find_runs, read_run

SAME_RESULT = {
    "log_every", "video", "checkpoint_minutes", "checkpoint_every", "save_replay",
    "seed", "env.seed", "device", "threads", "begun_as", "env.server", "env.num_threads", "replay.device",
    "eval.every", "eval.rounds", "eval.vlm", "vlm.graph", "vlm.attention", "agent.graph", "agent.compile",
}  # fmt: skip
"""Settings that may differ within a group."""
_NAMED_APART = SAME_RESULT | {"agent.kind", "method"}
"""The same, and what a label says of every group."""
_MOST_SETTINGS = 3  # in a label
_WITHOUT_AGENT = ("vbe", "vpf")


@dataclass
class Group:
    """Finished runs that differ in the seed alone, by seed."""

    kind: str
    method: str
    settings: dict[str, Any]
    """Those of its first run."""
    runs: list[Run]
    label: str = ""
    """Agent and method, and what else tells it from other groups of the task."""

    @property
    def scored(self) -> list[Run]:
        """The runs that have an outcome."""
        return [run for run in self.runs if run.final is not None]

    @property
    def model(self) -> str:
        return self.runs[0].model


@dataclass
class Task:
    """An environment with episodes of one length, and the groups that were run in it."""

    env_id: str
    title: str
    """The presets from which its runs began, else env.id."""
    groups: list[Group]

    @property
    def paper(self) -> PaperTask | None:
        return TASKS.get(self.env_id)

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]

    @property
    def random_return(self) -> float | None:
        """Mean return of the random policy over the runs that measured it."""
        means = [run.evaluations["random"].mean for run in self.runs if "random" in run.evaluations]
        return sum(means) / len(means) if means else None

    def base(self, group: Group) -> Group | None:
        """What a group is compared with: the agent of its kind alone (method off), else the first group.
        None: the group is that itself."""
        alone = [g for g in self.groups if g.method == "off" and g.kind == group.kind]
        chosen = alone[0] if alone else self.groups[0]
        return None if chosen is group else chosen


@dataclass
class Study:
    """All that a report is about."""

    tasks: list[Task]
    unfinished: list[Run] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        """The finished runs."""
        return [run for task in self.tasks for run in task.runs]

    @property
    def groups(self) -> list[Group]:
        return [group for task in self.tasks for group in task.groups]

    @property
    def labels(self) -> list[str]:
        """Those of all groups, each once."""
        return list(dict.fromkeys(group.label for group in self.groups))


def read_study(paths: Sequence[Path]) -> Study:
    """Reads the runs that are given or lie below the folders given.

    Raises:
        UserError: there is no run, none can be read, or two runs are of the same task, settings and seed.
    """
    read = [read_run(folder) for folder in find_runs(paths)]
    broken = [run for run in read if isinstance(run, Broken)]
    runs = [run for run in read if isinstance(run, Run)]
    if not runs:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        where = broken[0].folder if broken else ", ".join(map(str, paths))
        raise UserError(
            f"no run in {where} can be read: {broken[0].problem}{more}" if broken else f"no run in {where}"
        )
    finished = [run for run in runs if run.finished]
    return Study(_tasks(finished), [run for run in runs if not run.finished], broken)


def differing(groups: Sequence[Group]) -> list[str]:
    """The names of the settings in which groups differ, but for agent and method."""
    names = dict.fromkeys(name for group in groups for name in group.settings)
    return [
        name
        for name in names
        if name not in _NAMED_APART and len({json.dumps(g.settings.get(name)) for g in groups}) > 1
    ]


def _tasks(runs: Sequence[Run]) -> list[Task]:
    by_task: dict[tuple[str, Any], list[Run]] = {}
    for run in runs:
        by_task.setdefault((run.env_id, run.settings.get("env.max_episode_steps")), []).append(run)
    ids = [env_id for env_id, _ in by_task]
    tasks = []
    for (env_id, length), own in by_task.items():
        names = dict.fromkeys(run.preset for run in own if run.preset)
        title = ", ".join(names) or env_id
        if ids.count(env_id) > 1:
            title += f", episodes of {length} steps"
        tasks.append(Task(env_id, title, _groups(own)))
    return tasks


def _groups(runs: Sequence[Run]) -> list[Group]:
    by_settings: dict[str, Group] = {}
    for run in runs:
        telling = {name: value for name, value in run.settings.items() if name not in _NAMED_APART}
        key = json.dumps([run.kind, run.method, telling], sort_keys=True)
        group = by_settings.setdefault(key, Group(run.kind, run.method, run.settings, []))
        same = [other for other in group.runs if other.seed == run.seed]
        if same:
            raise UserError(
                f"{same[0].folder} and {run.folder} are the same task, method, settings and seed "
                f"({run.seed}): a seed counts once, so leave one of them out"
            )
        group.runs.append(run)
    groups = list(by_settings.values())
    for group in groups:
        group.runs.sort(key=lambda run: (run.seed is None, run.seed))
    _label(groups)
    return groups


def _label(groups: Sequence[Group]) -> None:
    """Names the groups of a task."""
    for group in groups:
        alike = [g for g in groups if (g.kind, g.method) == (group.kind, group.method)]
        names = differing(alike)
        agent = [] if group.method in _WITHOUT_AGENT else [group.kind]
        parts = [" · ".join([*agent, group.method])]
        parts += [f"{name}={short(group.settings.get(name))}" for name in names[:_MOST_SETTINGS]]
        group.label = ", ".join(parts)
    taken: dict[str, int] = {}
    for group in groups:
        number = taken[group.label] = taken.get(group.label, 0) + 1
        if number > 1:
            group.label += f" #{number}"


def short(value: Any) -> str:
    """A setting's value; of a path its last part."""
    return value.rstrip("/").rpartition("/")[2] if isinstance(value, str) else str(value)
