"""What EDDF kept, and how RALW weighted it: over rounds, and in the rounds of a run."""

from collections.abc import Callable

import numpy as np

from .charts import rounds_axis
from .context import Context, seeds_of
from .groups import Group, Task
from .markup import Markup, figure, join, note, number, section, tag
from .round_file import read_rounds
from .round_pictures import distributions, frames
from .runs import Run
from .series import Series, by_round, kept_share
from .statistics import Curve, curve

_QUARTERS = [f"kept_share_quarter_{quarter}" for quarter in (1, 2, 3, 4)]


def _figure_of(name: str) -> Callable[[Run], Series]:
    return lambda run: by_round(run, name)


_BY_ROUND: dict[str, tuple[Callable[[Run], Series], str]] = {
    "threshold τ": (_figure_of("tau"), "Threshold of Eq. 5, in z-scores of the returns."),
    "cutoff": (_figure_of("cutoff"), "The threshold in the unit of returns."),
    "policy entropy": (_figure_of("entropy"), "The entropy in Eq. 5, in nats."),
    "kept share": (kept_share, "Share of the round’s samples that EDDF kept."),
    "share with weight": (_figure_of("nonzero_share"), "Share of the kept samples with a weight above 0."),
}  # fmt: skip


def filter_section(context: Context) -> Markup:
    parts = []
    for task in context.study.tasks:
        groups = [group for group in task.groups if any(run.rounds for run in group.runs)]
        if groups:
            parts.append(tag("h3", task.title))
            parts.append(context.legend(group.label for group in groups))
            parts.append(tag("div", *_by_round(context, task, groups), class_="grid"))
            samples = {group.label: _samples(context, group) for group in groups}
            parts += samples.values()
            if without := [label for label, shown in samples.items() if not shown]:
                parts.append(note(f"No rounds/round-N.npz, so no samples to show: {'; '.join(without)}."))
    return section(
        "filter",
        "The filter and the weights",
        note(
            "EDDF keeps the samples of a round whose return lies above the threshold (Eq. 5); RALW weights "
            "the kept ones by return, the lower half of their range by 0 (Eq. 6)."
        ),
        *(parts or [note("No run had a fine-tuning round.")]),
    )


def _by_round(context: Context, task: Task, groups: list[Group]) -> list[Markup]:
    charts = []
    for title, (read, caption) in _BY_ROUND.items():
        found = [(g, c) for g in groups if (c := curve([read(run) for run in g.runs])) is not None]
        if found:
            charts.append(_chart(context, task, title, caption, found))
    return [*charts, *_quarters(context, task, groups)]


def _chart(
    context: Context, task: Task, title: str, caption: str, found: list[tuple[Group, Curve]], x: str = ""
) -> Markup:
    said = "; ".join(f"{g.label}: {', '.join(map(number, c.mean))}" for g, c in found)
    with context.charts.draw(title, f"{title}, {task.title}. {said}") as chart:
        for group, drawn in found:
            chart.curve(drawn, context.look(group))
        rounds_axis(chart.axes)
        if x:
            chart.axes.set_xlabel(x)
        if "share" in title:
            chart.axes.set_ylim(bottom=0)
    return figure(chart.svg, f"{caption} {seeds_of(c for _, c in found)}, with 95 % intervals.")


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
    caption = "Share that EDDF kept by the quarter of the episode, averaged over rounds."
    title = "kept share by quarter"
    return [_chart(context, task, title, caption, found, "quarter of the episode")] if found else []


def _samples(context: Context, group: Group) -> Markup:
    """The samples of each run's rounds; those of the first seed are open, and have frames."""
    parts: list[Markup] = []
    first = True
    for run in group.runs:
        rounds, problems = read_rounds(run.folder)
        lines = [tag("p", problem, class_="note mark") for problem in problems]
        if rounds:
            pictures = frames(context, rounds) if first else []  # of one run: they are large
            charts = tag("div", *distributions(context, rounds, group, run), class_="grid wide")
            summary = tag("summary", f"{group.label}, seed {run.seed}: the samples of each round")
            lines = [tag("details", summary, charts, *pictures, *lines, open=first)]
            first = False
        parts += lines
    return join(parts)
