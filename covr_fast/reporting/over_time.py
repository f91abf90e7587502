"""Learning curves, and how far agent and VLM agree, over environment steps."""

from .charts import steps_axis
from .context import Context, seeds_of, with_intervals
from .groups import Group, Task
from .markup import Markup, exact, figure, join, note, number, section, tag
from .series import Series, returns, series
from .statistics import Curve, curve

_MOST_BANDS = 6  # groups in a chart with bands
_MOST_NAMED = 4  # published figures in a chart that are named there
_AGREEMENT = {
    "prior_to_action": (
        "VLM's prior to executed action",
        "Mean squared distance between the VLM’s priors and the actions that were executed.",
    ),
    "prior_distance": (
        "VLM's prior to actor",
        "Mean squared distance between priors and the actor’s actions on the batches of Eq. 4, once guided.",
    ),
    "prior_to_q": (
        "weight of the prior's term",
        "λ times the term of Eq. 4, relative to the batch’s mean |Q|.",
    ),
    "guided_share": ("guided share", "Share of a batch’s transitions that carry a trusted prior."),
}


def curves_section(context: Context) -> Markup:
    charts = [_learning_curve(context, task) for task in context.study.tasks]
    return section(
        "curves",
        "Learning curves",
        note(
            "Return of the actor by environment steps: the mean over seeds, with its 95 % bootstrap interval "
            "as a band, and every seed as a thin line. One seed has no band."
        ),
        context.legend(context.study.labels),
        tag("div", *charts, class_="grid wide") if charts else note("No run is finished."),
    )


def _learning_curve(context: Context, task: Task) -> Markup:
    curves: list[tuple[Group, Curve]] = []
    single: list[tuple[Group, Series]] = []
    untrained: list[tuple[Group, float]] = []
    sources: dict[str, list[str]] = {}
    for group in task.groups:
        source, own = returns(group.runs)
        drawn = curve(own)
        if drawn is not None:
            curves.append((group, drawn))
            single += [(group, each) for each in own if len(own) > 1]
            sources.setdefault(source, []).append(group.label)
        elif finals := [run.final.mean for run in group.runs if run.final is not None]:
            untrained.append((group, sum(finals) / len(finals)))
    ends = "; ".join(f"{g.label}: {number(c.mean[-1])} at {c.steps[-1]:,.0f}" for g, c in curves)
    published = _published_levels(task)
    with context.charts.draw(task.title, f"Learning curves in {task.title}. {ends}", height=3.1) as chart:
        for group, each in single if len(curves) <= _MOST_BANDS else []:
            chart.axes.plot(*each, color=context.look(group).colour, linewidth=0.6, alpha=0.45)
        for group, drawn in curves:
            chart.curve(drawn, context.look(group), band=len(curves) <= _MOST_BANDS)
        for group, value in untrained:
            said = f"{group.label}, not trained"
            chart.level(value, context.look(group).colour, said, dash="dashdot", left=True)
        for label, (value, text) in published.items():
            chart.level(value, context.looks[label].colour, text if len(published) <= _MOST_NAMED else "")
        if task.random_return is not None:
            chart.level(task.random_return, "#7d868f", "random policy", dash="dotted")
        steps_axis(chart.axes)
        if not curves:
            chart.axes.set_xticks([])
        chart.axes.set_ylabel("return")
    from_what = [f"returns of {source} ({', '.join(labels)})" for source, labels in sources.items()]
    if len(sources) == 1:
        from_what = [f"returns of {next(iter(sources))}"]
    caption = f"{'; '.join(from_what) or 'No curve'}; {seeds_of(c for _, c in curves)}."
    if len(curves) > _MOST_BANDS:
        caption += " So many groups are drawn without bands."
        if any(c.low is not None for _, c in curves):
            caption += " The intervals at the end are below."
    if published and task.paper:
        caption += (
            f" Dashed: the published figure after {task.paper.steps:,} steps (see below whether it compares)."
        )
    return figure(chart.svg, caption[0].upper() + caption[1:])


def _published_levels(task: Task) -> dict[str, tuple[float, str]]:
    """By label of a group that has a row in the paper: its figure, and what the line is called."""
    if task.paper is None:
        return {}
    rows = {group.label: task.paper.row(group.kind, group.method) for group in task.groups}
    return {
        label: (row.mean, f"published {row.name}: {exact(row.mean)}") for label, row in rows.items() if row
    }


def agreement_section(context: Context) -> Markup:
    parts = [_agreement(context, task) for task in context.study.tasks]
    labels = [label for label in context.study.labels if label in _asked_a_vlm(context)]
    shown = join(parts) or note("No run has logged any of these figures.")
    return section(
        "priors",
        "Do agent and VLM agree?",
        note("The VLM’s action priors against the agent’s actions, means over seeds."),
        context.legend(labels) if any(parts) else Markup(""),
        shown,
    )


def _asked_a_vlm(context: Context) -> set[str]:
    """The labels of groups that have logged any of these figures."""
    groups = context.study.groups
    return {
        g.label
        for g in groups
        if any(name in m for run in g.runs for m in run.metrics for name in _AGREEMENT)
    }


def _agreement(context: Context, task: Task) -> Markup:
    charts = []
    for name, (title, caption) in _AGREEMENT.items():
        own = {g.label: curve([series(run, name) for run in g.runs]) for g in task.groups}
        found = {label: drawn for label, drawn in own.items() if drawn is not None}
        if found:
            said = f"{caption} {with_intervals(found.values())}"
            charts.append(figure(_chart(context, task, title, found), said))
    return join([tag("h3", task.title), tag("div", *charts, class_="grid")]) if charts else Markup("")


def _chart(context: Context, task: Task, title: str, curves: dict[str, Curve]) -> Markup:
    ends = "; ".join(f"{label}: {number(c.mean[0])} to {number(c.mean[-1])}" for label, c in curves.items())
    with context.charts.draw(title, f"{title} over steps, {task.title}. {ends}") as chart:
        for label, drawn in curves.items():
            chart.curve(drawn, context.looks[label])
        steps_axis(chart.axes)
        chart.axes.set_ylim(bottom=0)
    return chart.svg
