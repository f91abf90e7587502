"""The samples of a run's rounds: what they were filtered by, their weights, and some of their frames."""

from collections.abc import Sequence

import numpy as np

from .context import Context
from .groups import Group
from .markup import Markup, figure, note, number, picture, tag
from .round_file import RoundFile
from .rules import Rules
from .runs import Run

KEPT, DROPPED = "#009E73", "#D55E00"
_MOST_ROUNDS = 6  # that are drawn; the others lie between
_BINS = 32


def distributions(context: Context, rounds: Sequence[RoundFile], group: Group, run: Run) -> list[Markup]:
    """Histograms of the returns, or what else was filtered by, and of the weights, a row per round."""
    shown = _spread(rounds, _MOST_ROUNDS)
    height = 0.7 + 0.85 * len(shown)
    of = f"{group.label}, seed {run.seed}"
    rules = Rules(run.settings)
    said = "; ".join(
        f"round {r.number}: {r.kept.sum()} of {len(r.kept)}"
        + (" at random" if rules.at_random else f" above {number(r.cutoff)}")
        for r in shown
    )
    low = min(r.returns.min(initial=np.inf) for r in shown)
    high = max(r.returns.max(initial=-np.inf) for r in shown)
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    with context.charts.draw_rows(
        len(shown), f"{rules.scores.capitalize()} in D_f, {of}. {said}", height
    ) as charts:
        for chart, r in zip(charts, shown, strict=True):
            total, kept = (np.histogram(values, edges)[0] for values in (r.returns, r.returns[r.kept]))
            chart.axes.stairs(total, edges, fill=True, color=DROPPED, alpha=0.55)
            chart.axes.stairs(kept, edges, fill=True, color=KEPT)
            chart.axes.axvline(r.cutoff, color="#010203", linewidth=1.2, linestyle="dashed")
            chart.axes.set_ylabel(f"round {r.number}")
            chart.axes.set_yticks([])
        charts[0].axes.set_title(f"{rules.scores} of D_f")
        charts[-1].axes.set_xlabel(rules.score)
    scores = figure(charts[0].svg, f"Green: kept, orange: dropped. Dashed: {rules.cut}.")

    edges = np.linspace(0, 1, 21)
    said = "; ".join(
        f"round {r.number}: mean {number(float(r.weights.mean()))}" for r in shown if len(r.weights)
    )
    with context.charts.draw_rows(
        len(shown), f"{rules.weight[0].upper()}{rules.weight[1:]}s, {of}. {said}", height
    ) as charts:
        for chart, r in zip(charts, shown, strict=True):
            above = r.weights[r.weights > 0]
            chart.axes.stairs(np.histogram(above, edges)[0], edges, fill=True, color="#0072B2")
            zero = f"{1 - len(above) / max(len(r.weights), 1):.0%} have weight 0"
            chart.axes.set_title(zero, loc="right", fontsize=8, fontweight="normal")  # beside no bar
            chart.axes.set_ylabel(f"round {r.number}")
            chart.axes.set_yticks([])
        charts[0].axes.set_title("weights above 0")
        charts[-1].axes.set_xlabel(rules.weight)
    weights = figure(charts[0].svg, "Of the samples with a part in the loss: those of weight 0 have none.")
    return [scores, weights]


def frames(context: Context, rounds: Sequence[RoundFile], run: Run) -> list[Markup]:
    """Frames of the first and the last round that have some, as far as there is room on the page."""
    parts: list[Markup] = []
    score = Rules(run.settings).score
    for r in _spread([r for r in rounds if len(r.frames)], 2):
        for words, wanted in (("kept", True), ("dropped", False)):
            shown = [_frame(r, i, words, score) for i, at in enumerate(r.frame_at) if r.kept[at] == wanted]
            if not shown:
                continue
            if not context.pictures.take(sum(map(len, shown))):
                return [*parts, note("More frames are in the run folder: the page has no room for them.")]
            parts.append(note(f"Round {r.number}, at {r.step:,} steps: frames that were {words}."))
            parts.append(tag("div", *shown, class_="frames"))
    return parts


def _frame(r: RoundFile, i: int, words: str, score: str) -> Markup:
    at = int(r.frame_at[i])
    lines = [f"{score} {number(float(r.returns[at]))}", f"decision {int(r.time[at])}"]
    if at in r.weight_of:
        lines.append(f"weight {r.weight_of[at]:.2f}")
    alt = f"A frame that was {words}: {', '.join(lines)}"
    return figure(picture(r.frames[i], alt), Markup("<br>").join(lines), words)


def _spread(rounds: Sequence[RoundFile], most: int) -> list[RoundFile]:
    """At most so many of them, evenly over all, the first and the last included."""
    if len(rounds) <= most:
        return list(rounds)
    return [rounds[i] for i in np.linspace(0, len(rounds) - 1, most).round().astype(int)]
