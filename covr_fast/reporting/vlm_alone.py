"""The return of the VLM alone, by the fine-tuning rounds that it has had."""

from .charts import rounds_axis
from .context import Context, with_intervals
from .groups import Task
from .markup import Markup, exact, figure, note, number, section, tag
from .series import vlm_by_round
from .statistics import Curve, curve


def vlm_section(context: Context) -> Markup:
    charts = [chart for task in context.study.tasks if (chart := _chart(context, task))]
    groups = context.study.groups
    labels = dict.fromkeys(g.label for g in groups if curve([vlm_by_round(run) for run in g.runs]))
    return section(
        "vlm",
        "The VLM alone, by round",
        note("Every decision is the VLM’s. Round 0 is before any tuning; means over seeds."),
        context.legend(list(labels)) if charts else Markup(""),
        tag("div", *charts, class_="grid wide") if charts else note("No run has evaluated its VLM alone."),
    )


def _chart(context: Context, task: Task) -> Markup | None:
    found: dict[str, Curve] = {}
    for group in task.groups:
        drawn = curve([vlm_by_round(run) for run in group.runs])
        if drawn is not None:
            found[group.label] = drawn
    if not found:
        return None
    published = task.paper.vlm_by_round if task.paper else ()
    said = "; ".join(f"{label}: {', '.join(map(number, c.mean))}" for label, c in found.items())
    with context.charts.draw(task.title, f"Return of the VLM alone by round, {task.title}. {said}") as chart:
        for label, drawn in found.items():
            chart.curve(drawn, context.looks[label])
        if published:
            chart.axes.plot(
                *zip(*published, strict=True), "D--", color="#7d868f", markersize=4, linewidth=1.2
            )
        if task.random_return is not None:
            chart.level(task.random_return, "#7d868f", "random policy", dash="dotted")
        rounds_axis(chart.axes)
        chart.axes.set_ylabel("return")
    caption = f"The rounds that all seeds had. {with_intervals(found.values())}"
    if published:
        said = ", ".join(f"{exact(value)} after {rounds}" for rounds, value in published)
        caption += f" Grey diamonds: published, {said}."
    return figure(chart.svg, caption)
