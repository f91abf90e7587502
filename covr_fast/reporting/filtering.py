"""What the filter kept, and how it was weighted: over rounds, and in the rounds of a run."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .charts import rounds_axis
from .context import Context, listed, with_intervals
from .groups import Group, Task
from .markup import Markup, figure, join, note, number, section, tag
from .round_file import read_rounds
from .round_pictures import distributions, frames
from .rules import Rules
from .runs import Run
from .series import Series, by_round, kept_share
from .statistics import Curve, curve

_QUARTERS = [f"kept_share_quarter_{quarter}" for quarter in (1, 2, 3, 4)]
_SHARE = "share"
"""A unit that needs no name at the axis."""


class _Figure(NamedTuple):
    """A figure of a round's record."""

    read: Callable[[Run], Series]
    unit: Callable[[Rules], str]
    """Groups of different units have charts of their own."""
    caption: str
    with_random: str = ""
    """What it is of a group whose filter is random."""


def _entropy(run: Run) -> Series:
    return by_round(run, Rules(run.settings).entropy[0])


_BY_ROUND = {
    "threshold τ": _Figure(
        lambda run: by_round(run, "tau"),
        lambda rules: rules.threshold_unit,
        "Threshold of the filter: of EDDF that of Eq. 5.",
        "only says how many are kept",
    ),
    "cutoff": _Figure(
        lambda run: by_round(run, "cutoff"),
        lambda rules: rules.scores,
        "The threshold in the unit of what is filtered.",
        "only says how many are kept",
    ),
    "policy entropy": _Figure(_entropy, lambda rules: rules.entropy[1], "The entropy in Eq. 5."),
    "kept share": _Figure(kept_share, lambda _: _SHARE, "Share of the round’s samples that the filter kept."),
    "share with weight": _Figure(
        lambda run: by_round(run, "nonzero_share"),
        lambda _: _SHARE,
        "Share of the kept samples with a weight above 0.",
    ),
}


def filter_section(context: Context) -> Markup:
    parts = []
    for task in context.study.tasks:
        groups = [group for group in task.groups if any(run.rounds for run in group.runs)]
        if groups:
            parts.append(tag("h3", task.title))
            parts.append(context.legend(group.label for group in groups))
            parts += _rules_apart(groups)
            parts.append(tag("div", *_by_round(context, task, groups), class_="grid"))
            samples = {group.label: _samples(context, group) for group in groups}
            parts += samples.values()
            if without := [label for label, shown in samples.items() if not shown]:
                parts.append(note(f"No rounds/round-N.npz, so no samples to show: {'; '.join(without)}."))
    return section(
        "filter",
        "The filter and the weights",
        note(
            "COVR: EDDF keeps the samples of a round whose return lies above the threshold (Eq. 5); RALW "
            "weights the kept ones by return, the lower half of their range by 0 (Eq. 6)."
        ),
        *(parts or [note("No run had a fine-tuning round.")]),
    )


def _rules_apart(groups: list[Group]) -> list[Markup]:
    """A line about the groups that do not filter and weight as COVR does."""
    apart = {group.label: Rules(group.settings).differences() for group in groups}
    said = "; ".join(f"{label} {listed(rules)}" for label, rules in apart.items() if rules)
    return [note(f"Other rules: {said}.")] if said else []


def _by_round(context: Context, task: Task, groups: list[Group]) -> list[Markup]:
    charts = []
    for title, figure_ in _BY_ROUND.items():
        by_unit: dict[str, list[tuple[Group, Curve]]] = {}
        for group in groups:
            if (drawn := curve([figure_.read(run) for run in group.runs])) is not None:
                by_unit.setdefault(figure_.unit(Rules(group.settings)), []).append((group, drawn))
        for unit, found in by_unit.items():
            random = [g.label for g, _ in found if Rules(g.settings).at_random] if figure_.with_random else []
            caption = figure_.caption + (
                f" Of {', '.join(random)} it {figure_.with_random}." if random else ""
            )
            charts.append(_chart(context, task, title, caption, found, unit))
    return [*charts, *_quarters(context, task, groups)]


def _chart(
    context: Context,
    task: Task,
    title: str,
    caption: str,
    found: list[tuple[Group, Curve]],
    unit: str,
    x: str = "",
) -> Markup:
    said = "; ".join(f"{g.label}: {', '.join(map(number, c.mean))}" for g, c in found)
    with context.charts.draw(title, f"{title}, {task.title}. {said}") as chart:
        for group, drawn in found:
            chart.curve(drawn, context.look(group))
        rounds_axis(chart.axes)
        if x:
            chart.axes.set_xlabel(x)
        if unit == _SHARE:
            chart.axes.set_ylim(bottom=0)
        else:
            chart.axes.set_ylabel(unit)
    return figure(chart.svg, f"{caption} {with_intervals(c for _, c in found)}")


def _quarters(context: Context, task: Task, groups: list[Group]) -> list[Markup]:
    """The share that was kept by the time in the episode, averaged over a run's rounds."""
    found = []
    for group in groups:
        own = []
        for run in group.runs:
            shares = [by_round(run, name)[1] for name in _QUARTERS]
            if all(len(share) for share in shares):
                own.append((np.arange(1.0, 5.0), np.array([share.mean() for share in shares])))
        if (drawn := curve(own)) is not None:
            found.append((group, drawn))
    caption = "Share that the filter kept by the quarter of the episode, averaged over rounds."
    title = "kept share by quarter"
    return [_chart(context, task, title, caption, found, _SHARE, "quarter of the episode")] if found else []


def _samples(context: Context, group: Group) -> Markup:
    """The samples of each run's rounds; those of the first seed are open, and have frames."""
    parts: list[Markup] = []
    first = True
    for run in group.runs:
        rounds, problems = read_rounds(run.folder)
        lines = [tag("p", problem, class_="note mark") for problem in problems]
        if rounds:
            pictures = frames(context, rounds, run) if first else []  # of one run: they are large
            charts = tag("div", *distributions(context, rounds, group, run), class_="grid wide")
            summary = tag("summary", f"{group.label}, seed {run.seed}: the samples of each round")
            lines = [tag("details", summary, charts, *pictures, *lines, open=first)]
            first = False
        parts += lines
    return join(parts)
