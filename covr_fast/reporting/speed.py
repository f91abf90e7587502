"""Where the time went."""

import numpy as np

from .context import Context
from .groups import Group
from .markup import Markup, note, number, scrolled_table, section, tag

_PARTS = {
    "policy update": "#0072B2", "fine-tuning": "#D55E00", "prior": "#E69F00", "simulation": "#009E73",
    "evaluation": "#CC79A7", "acting": "#56B4E9", "replay": "#8a6fb0", "checkpoint": "#a08060",
}  # fmt: skip
_OTHER = "#9aa4af"


def speed_section(context: Context) -> Markup:
    rows = [_row(task.title, group) for task in context.study.tasks for group in task.groups]
    table = scrolled_table(
        ["group", "shares", "steps/s", "a run", *_PARTS, "other"],
        rows,
        "Environment steps per second, wall time of a run, and its shares: means over the runs of a group.",
    )
    colours = [*_PARTS.items(), ("other", _OTHER)]
    legend = tag("ul", *(tag("li", _swatch(colour), name) for name, colour in colours), class_="legend")
    return section(
        "speed",
        "Throughput",
        note("As each run measured itself, with whatever else its machine did meanwhile."),
        *([legend, table] if rows else [note("No run is finished.")]),
    )


def _swatch(colour: str) -> Markup:
    bar = tag("rect", width=26, height=10, fill=colour)
    return tag("svg", bar, viewBox="0 0 26 10", aria_hidden="true")


def _row(task: str, group: Group) -> list[object]:
    shares = [run.summary.get("time_shares", {}) for run in group.runs]
    means = {name: float(np.mean([own.get(name, 0.0) for own in shares])) for name in _PARTS}
    if not any(means.values()):
        means = dict.fromkeys(_PARTS, float("nan"))
    rest = 1 - sum(means.values())
    parts = [*means.items(), ("other", rest)]
    bar = [
        tag(
            "span",
            style=f"width:{share:.1%};background:{_PARTS.get(name, _OTHER)}",
            title=f"{name} {share:.0%}",
        )
        for name, share in parts
        if share > 0
    ]
    return [
        tag("th", group.label, tag("br"), tag("span", task, class_="note"), scope="row"),
        tag("td", tag("div", *bar, class_="shares", aria_hidden="true")),
        _mean(group, "steps_per_second"),
        duration(_values(group, "seconds")),
        *(f"{share:.0%}" if share == share else "-" for _, share in parts),
    ]


def _values(group: Group, name: str) -> list[float]:
    return [run.summary[name] for run in group.runs if name in run.summary]


def _mean(group: Group, name: str) -> str:
    values = _values(group, name)
    return number(float(np.mean(values))) if values else "-"


def duration(seconds: list[float]) -> str:
    """The range of several times, in a unit that suits them."""
    if not seconds:
        return "-"
    unit, size = ("h", 3600) if max(seconds) >= 7200 else ("min", 60) if max(seconds) >= 120 else ("s", 1)
    ends = dict.fromkeys(
        f"{each / size:.{0 if unit == 's' else 1}f}" for each in (min(seconds), max(seconds))
    )
    return f"{' to '.join(ends)} {unit}"
