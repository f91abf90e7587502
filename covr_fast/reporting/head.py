"""What was run, and what of it could not be used."""

import datetime
import json
from collections.abc import Iterable, Sequence

from .. import __version__
from .context import Context, listed, seeds_text
from .groups import Group, Study, Task, differing
from .markup import Markup, join, note, scrolled_table, tag
from .runs import Run

_MOST_GROUPS = 4  # that the first sentence names
_MOST_OPEN = 8  # rows of settings that are shown without a click


def head(context: Context) -> Markup:
    study = context.study
    return tag(
        "header",
        tag("h1", _title(study)),
        tag("p", _sentence(study), class_="lede"),
        _facts(study),
        _versions(study.runs),
        *(_settings(task) for task in study.tasks),
        _problems(study),
    )


def _title(study: Study) -> str:
    return f"COVR: {listed([task.title for task in study.tasks])}" if study.tasks else "COVR: no finished run"


def _sentence(study: Study) -> str:
    if not study.tasks:
        return f"None of the {len(study.unfinished)} runs is finished."
    runs, groups = len(study.runs), study.labels
    said = f"{runs} finished {'run' if runs == 1 else 'runs'} in {listed([t.title for t in study.tasks])}"
    if len(groups) <= _MOST_GROUPS and len(study.tasks) == 1:
        return f"{said}: {'; '.join(f'{g.label} ({seeds_text(len(g.runs))})' for g in study.groups)}."
    return (
        f"{said}, in {len(groups)} {'group' if len(groups) == 1 else 'groups'} of agent, method and settings."
    )


def _facts(study: Study) -> Markup:
    runs = [*study.runs, *study.unfinished]
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    hours = sum(run.summary.get("seconds", 0) for run in study.runs) / 3600
    facts = {
        "Tasks": [task.title for task in study.tasks],
        "Environments": [task.env_id for task in study.tasks],
        "Methods": [run.method for run in runs],
        "Agents": [run.kind for run in runs],
        "VLMs": [run.model for run in runs],
        "Seeds": map(str, seeds),
        "Environment steps": [f"{steps:,}" for steps in sorted({run.steps for run in study.runs})],
        "Measured on": [run.summary.get("machine", run.summary.get("device", "-")) for run in study.runs],
        "Finished runs ended": _dates(study.runs),
        "Wall time of all runs": [f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.0f} min"],
        "Page made by": [f"covr_fast {__version__}, {datetime.date.today()}"],
    }
    shown = ((tag("dt", name), tag("dd", ", ".join(dict.fromkeys(v)) or "-")) for name, v in facts.items())
    return tag("dl", *(tag("div", *pair) for pair in shown), class_="facts")


def _versions(runs: Sequence[Run]) -> Markup:
    """Of each package, those that the finished runs name; older runs name none."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for package, version in run.summary.get("versions", {}).items():
            found.setdefault(package, {})[version] = None
    named = [f"{package} {' and '.join(versions)}" for package, versions in found.items()]
    if silent := sum("versions" not in run.summary for run in runs):
        named.append(f"not recorded in {silent} of {len(runs)} runs" if found else "not recorded")
    return note(f"Versions: {', '.join(named)}.") if named else Markup("")


def _dates(runs: Iterable[Run]) -> list[str]:
    """The first and the last day on which a summary was written."""
    times = sorted((run.folder / "summary.json").stat().st_mtime for run in runs)
    ends = (datetime.date.fromtimestamp(time) for time in (times[:1] + times[-1:]))
    return [" to ".join(dict.fromkeys(map(str, ends)))] if times else []


def _settings(task: Task) -> Markup:
    """The settings in which a task's groups differ."""
    names = differing(task.groups)
    if not names:
        return Markup("")
    table = scrolled_table(
        ["setting", *(group.label for group in task.groups)],
        ([name, *(_value(group, name) for group in task.groups)] for name in names),
        f"Settings that differ between the groups, {task.title}.",
        words=1 + len(task.groups),
    )
    summary = tag("summary", f"{len(names)} settings differ between the groups of {task.title}")
    return table if len(names) <= _MOST_OPEN else tag("details", summary, table)


def _value(group: Group, name: str) -> str:
    value = group.settings.get(name, "-")
    return value if isinstance(value, str) else json.dumps(value)


def _problems(study: Study) -> Markup:
    """A line for what cannot be read, is not finished, or lacks something."""
    lines = [tag("li", tag("code", run.folder), f" cannot be read: {run.problem}") for run in study.broken]
    for run in study.unfinished:
        last = run.metrics[-1]["step"] if run.metrics else 0
        asked = run.settings.get("steps", "-")
        said = f" is not finished: {last} of {asked} steps, {len(run.metrics)} lines of metrics."
        lines.append(tag("li", tag("code", run.folder), said))
    lacking: dict[str, list[str]] = {}
    for run in [*study.runs, *study.unfinished]:
        for name in run.lacks:
            lacking.setdefault(name, []).append(str(run.folder))
    for name, folders in lacking.items():
        lines.append(tag("li", f"{name} is missing in ", tag("code", ", ".join(folders)), "."))
    if not lines:
        return Markup("")
    used = "What is not finished or cannot be read is in no figure below; what is missing is shown as “-”."
    return join([note(used), tag("ul", *lines, class_="note mark")])
