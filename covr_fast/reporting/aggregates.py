"""Aggregate figures over seeds, and over tasks where every group was run in each."""

from collections.abc import Sequence

import numpy as np

from . import statistics
from .context import Context, seeds_text
from .groups import Group, Task
from .markup import Markup, figure, join, note, number, scrolled_table, section, spread, tag
from .statistics import Estimate

_FEW = 5
"""Fewer seeds than these are said to be few."""
_CONTROL_TOP = 1000.0
"""The highest return of DMControl's tasks."""


def scores(group: Group) -> np.ndarray:
    """float64[runs, 1], the outcome of each run: the mean return of its evaluation episodes."""
    return np.array([[run.final.mean] for run in group.scored if run.final], np.float64)


def aggregates_section(context: Context) -> Markup:
    parts = [_task(context, task) for task in context.study.tasks]
    return section(
        "aggregates",
        "Aggregate figures",
        note(
            "Returns of the last evaluation, one figure per run: the mean over its evaluation episodes. IQM: "
            "mean of the middle half of the runs, of fewer than four the mean of all. Metrics of rliable "
            "(Agarwal et al. 2021); 95 % intervals: percentile bootstrap over seeds, stratified by task, "
            f"{statistics.REPETITIONS} draws ({statistics.PAIRED_REPETITIONS} for probabilities)."
        ),
        *(parts or [note("No run is finished.")]),
        _over_tasks(context),
    )


def _task(context: Context, task: Task) -> Markup:
    groups = [group for group in task.groups if group.scored]
    if not groups:
        return note(f"{task.title}: no run has an evaluation of what it trained.")
    counts = [len(group.scored) for group in groups]
    matrices = {id(group): scores(group) for group in groups}
    iqms = [statistics.iqm(matrices[id(group)]) for group in groups]
    rows = []
    for group, iqm in zip(groups, iqms, strict=True):
        own = matrices[id(group)]
        base = task.base(group)
        better = None
        if base is not None and id(base) in matrices:
            better = statistics.improvement(own, matrices[id(base)])
        rows.append([
            group.label, str(len(own)), with_interval(iqm), with_interval(statistics.median(own)),
            over_seeds(own), probability(better),
        ])  # fmt: skip
    table = scrolled_table(
        [
            "group",
            "seeds",
            "IQM [95 %]",
            "median [95 %]",
            "mean ± std over seeds",
            "P(better than base) [95 %]",
        ],
        rows,
        f"{task.title}: returns over seeds. {_bases(task)}",
    )
    chart = _intervals(context, task.title, "return", groups, iqms)
    return join([tag("h3", task.title), tag("div", chart, class_="grid wide"), table, _few(counts)])


def _bases(task: Task) -> str:
    bases = dict.fromkeys(base.label for group in task.groups if (base := task.base(group)))
    return f"Base: {', '.join(bases)}." if bases else ""


def _few(counts: Sequence[int]) -> Markup:
    if min(counts) >= _FEW:
        return Markup("")
    text = f"Only {seeds_text(min(counts))} in the smallest group: its interval is rough, mostly too narrow."
    if min(counts) == 1:
        text = "Groups of one seed have no interval: how far another seed would differ is not known."
    return tag("p", text, class_="note mark")


def _intervals(
    context: Context, where: str, unit: str, groups: Sequence[Group], estimates: Sequence[Estimate]
) -> Markup:
    said = "; ".join(f"{g.label}: {with_interval(e)}" for g, e in zip(groups, estimates, strict=True))
    title = f"IQM of {unit}s"
    with context.charts.draw(title, f"{title}, {where}. {said}", height=0.9 + 0.34 * len(groups)) as chart:
        names = [_wrapped(group.label) for group in groups]
        chart.intervals(estimates, [context.look(group) for group in groups], names)
        chart.axes.set_xlabel(unit)
    bars = " Bars: 95 % intervals over seeds." if any(e.low is not None for e in estimates) else ""
    return figure(chart.svg, f"Strokes: IQM.{bars}")


def _wrapped(label: str) -> str:
    """A label for a chart's narrow margin: its settings below."""
    first, *rest = label.split(", ")
    return "\n".join([first, *rest])


def _over_tasks(context: Context) -> Markup:
    """The groups that were run in every task, over all tasks."""
    tasks = context.study.tasks
    if len(tasks) < 2:
        return Markup("")
    everywhere = [
        label for label in context.study.labels if all(_find(task, label) is not None for task in tasks)
    ]
    heading = tag("h3", f"Over {len(tasks)} tasks")
    if not everywhere:
        return join([heading, note("No group was run in every task, so there is no figure over tasks.")])
    matrices = {label: _matrix(tasks, label) for label in everywhere}
    matrices = {label: own for label, own in matrices.items() if len(own)}
    if not matrices:
        return join([heading, note("No group has a seed that was run in every task.")])
    groups = {label: group for label in matrices if (group := _find(tasks[0], label))}
    iqms = {label: statistics.iqm(own) for label, own in matrices.items()}
    rows = []
    for label, own in matrices.items():
        base = tasks[0].base(groups[label])
        better = None
        if base is not None and base.label in matrices:
            better = statistics.improvement(own, matrices[base.label])
        rows.append([
            label, str(len(own)), with_interval(iqms[label]), with_interval(statistics.median(own)),
            with_interval(statistics.mean(own)), probability(better),
        ])  # fmt: skip
    table = scrolled_table(
        ["group", "seeds", "IQM [95 %]", "median [95 %]", "mean [95 %]", "P(better than base) [95 %]"],
        rows,
        "Scores over all tasks, of the seeds that were run in each.",
    )
    chart = _intervals(context, f"{len(tasks)} tasks", "score", [*groups.values()], [*iqms.values()])
    counts = [len(own) for own in matrices.values()]
    scales = note("Scores: ", "; ".join(_scale(task)[2] for task in tasks), ".")
    return join([heading, scales, tag("div", chart, class_="grid wide"), table, _few(counts)])


def _find(task: Task, label: str) -> Group | None:
    return next((group for group in task.groups if group.label == label and group.scored), None)


def _matrix(tasks: Sequence[Task], label: str) -> np.ndarray:
    """float64[runs, tasks], scaled, of the seeds that a group has in every task."""
    returns = []
    for task in tasks:
        group = _find(task, label)
        assert group is not None
        returns.append({run.seed: run.final.mean for run in group.scored if run.final})
    seeds = sorted(set.intersection(*(set(own) for own in returns)), key=str)
    scales = [_scale(task) for task in tasks]
    return np.array(
        [
            [(own[seed] - low) / (top - low) for own, (low, top, _) in zip(returns, scales, strict=True)]
            for seed in seeds
        ],
        np.float64,
    )


def _scale(task: Task) -> tuple[float, float, str]:
    """The returns that count as 0 and 1 where tasks are averaged, and how that is said."""
    if task.paper is not None and not task.env_id.startswith("carla"):
        return 0.0, _CONTROL_TOP, f"{task.title}, return / {_CONTROL_TOP:.0f}"
    top = max(float(scores(group).mean()) for group in task.groups if group.scored)
    low = 0.0 if task.random_return is None else task.random_return
    if top == low:
        low = top - 1
    zero = "a return of 0" if task.random_return is None else "the random policy"
    return low, top, f"{task.title}, 0 is {zero} ({number(low)}) and 1 the best group here ({number(top)})"


def over_seeds(own: np.ndarray) -> str:
    """The mean of float64[runs, 1] and its standard deviation, which a single run has not."""
    return number(own.mean()) if len(own) == 1 else spread(own.mean(), own.std())


def with_interval(estimate: Estimate) -> str:
    if estimate.low is None:
        return number(estimate.value)
    return f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"


def probability(estimate: Estimate | None) -> str:
    if estimate is None:
        return "base"
    if estimate.low is None:
        return f"{estimate.value:.2f}"
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"
