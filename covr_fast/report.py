"""What a user looks at after a run: the summary tables and curves.png, made from the run folder."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .digits import mean_and_std, returns_text
from .errors import UserError
from .files import read_json, read_records, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EVALUATIONS = {
    "random": "random policy",
    "vlm_before": "VLM alone, before",
    "vlm_after": "VLM alone, after",
    "actor": "actor alone, trained",
}

ROUND_COLUMNS = {
    "round": ("round", "{:.0f}"),
    "steps": ("step", "{:.0f}"),
    "in D_f": ("samples", "{:.0f}"),
    "tau": ("tau", "{:.2f}"),
    "kept": ("kept", "{:.0f}"),
    "weight > 0": ("nonzero_share", "{:.0%}"),
    "loss before": ("loss_before", "{:.3f}"),
    "loss after": ("loss_after", "{:.3f}"),
    "sec.": ("tuning_seconds", "{:.1f}"),
}
"""Heading -> (key of a round's record, format); the losses are those of the held-out samples. A round that
tuned nothing has no weight, loss and time."""

SUMMARY_PARTS = {
    "environment", "seed", "device", "steps", "decisions", "frames", "updates", "episodes", "seconds",
    "time_shares", "rounds", "evaluations",
}  # fmt: skip


def read_summary(run: Path) -> dict[str, Any]:
    """Reads summary.json of a finished run."""
    path = run / "summary.json"
    if not path.is_file():
        raise UserError(f"{run} holds no summary.json: it is not the folder of a finished run")
    summary = read_json(path, f"covr-fast train PRESET --resume {run} writes it again")
    if missing := SUMMARY_PARTS - summary.keys():
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}: is it the summary of a run?")
    return summary


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Reads metrics.jsonl of a run, oldest line first, without an incomplete last line."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run} holds no metrics.jsonl: is it the folder of a run?")
    return read_records(path)[0]


def shortest_names(runs: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parent folders as it takes to make them unique."""
    parts = [run.resolve().parts for run in runs]
    names = []
    for own in parts:
        others = {other for other in parts if other != own}
        lengths = (n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others))
        names.append("/".join(own[-next(lengths, len(own)) :]))
    return names


def new_table(title: str, words: Iterable[str], numbers: Iterable[str]) -> Table:
    """An empty table with these columns, those of numbers aligned to the right."""
    table = Table(*words, title=title, title_justify="left")
    for column in table.columns:
        column.overflow = "fold"  # or a narrow terminal would hide what tells labels apart
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def print_summary(summary: dict[str, Any], console: Console, run: str | None = None) -> None:
    """Prints the evaluations, the fine-tuning rounds and where the time went. `run` is a label, for where
    there are several runs."""
    title = f"{summary['environment']}, seed {summary['seed']}: episode returns"
    title = title if run is None else f"{run}: {title}"
    table = new_table(title, ["policy"], ["mean", "std", "episodes"])
    for name, label in EVALUATIONS.items():
        if (e := summary["evaluations"].get(name)) is not None:
            episodes = len(e["returns"])
            mean, std = mean_and_std(e["mean"], e["std"])
            table.add_row(label, mean, std if episodes > 1 else "-", str(episodes))
    console.print(table)

    if summary["rounds"]:
        table = new_table("fine-tuning rounds of the VLM", [], ROUND_COLUMNS)
        for r in summary["rounds"]:
            table.add_row(
                *(shown.format(r[key]) if key in r else "-" for key, shown in ROUND_COLUMNS.values())
            )
        console.print(table)

    shares = sorted(summary["time_shares"].items(), key=lambda item: -item[1])
    console.print(
        f"{summary['steps']} environment steps ({summary['decisions']} decisions), "
        f"{summary['updates']} updates, {summary['episodes']} episodes in {summary['seconds']:.0f} s on "
        f"{summary['device']}: {summary['steps_per_second']:.0f} steps/s"
    )
    console.print("wall time: " + ", ".join(f"{name} {share:.0%}" for name, share in shares))


def plot_curves(run: Path) -> Path:
    """Draws curves.png from metrics.jsonl and returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = read_metrics(run)
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)

    def series(name: str) -> tuple[list[float], list[float]]:
        points = [(m["step"], m[name]) for m in metrics if name in m and math.isfinite(m[name])]
        return [p[0] for p in points], [p[1] for p in points]

    def line(axes: "Axes", name: str, colour: str, label: str | None = None) -> bool:
        """Draws a figure of the metrics, if there is any."""
        steps, values = series(name)
        if steps:  # a line through a single point would not be seen
            axes.plot(steps, values, color=colour, label=label, marker="o" if len(steps) == 1 else None)
        return bool(steps)

    rounds = [m for m in metrics if "round/loss_after" in m]
    ax = axes[0, 0]
    line(ax, "episode_return", "tab:blue", "training episodes")
    for (name, label), colour in zip(
        EVALUATIONS.items(), ("tab:gray", "tab:olive", "tab:orange", "tab:green"), strict=True
    ):
        _, means = series(f"eval/{name}_mean")
        if means:
            said = f"{label}: {returns_text(means[-1], decimals=0)}"
            ax.axhline(means[-1], color=colour, linestyle="--", linewidth=1.2, label=said)
    ax.set(title="episode return", xlabel="environment steps", ylabel="sum of rewards")
    _say_if_empty(ax, empty=not ax.lines)

    ax = axes[0, 1]
    where = list(range(len(rounds)))
    for offset, when, colour in ((-0.2, "before", "tab:gray"), (0.2, "after", "tab:orange")):
        losses = [m[f"round/loss_{when}"] for m in rounds]
        ax.bar([x + offset for x in where], losses, 0.38, label=when, color=colour)
    ax.set(title="VLM loss on held-out kept samples", xlabel="fine-tuning round", ylabel="nats per token")
    ax.set_xticks(where, [f"{m['round/round']:.0f}" for m in rounds])
    if rounds:  # of no bars, a legend would not know the colours
        ax.legend(fontsize=8)
    _say_if_empty(ax, empty=not rounds)

    ax = axes[1, 0]
    drawn = line(ax, "q", "tab:blue")
    ax.set(title="mean Q and policy entropy", xlabel="environment steps")
    ax.set_ylabel("Q", color="tab:blue")
    twin = ax.twinx()
    drawn |= line(twin, "entropy", "tab:red")
    twin.set_ylabel("entropy / nats", color="tab:red")
    _say_if_empty(ax, twin, empty=not drawn)

    ax = axes[1, 1]
    names = sorted({name for m in metrics for name in m if name.startswith("time/")})
    last = next((m for m in reversed(metrics) if "time/other" in m), {})
    names = sorted(names, key=lambda n: last.get(n, 0.0))
    ax.barh([n.removeprefix("time/") for n in names], [last.get(n, 0.0) for n in names], color="tab:blue")
    ax.set(title="where the time went", xlabel="share of wall time", xlim=(0, 1))
    _say_if_empty(ax, empty=not names)

    for ax in (axes[0, 0], axes[1, 0]):
        for i, m in enumerate(m for m in metrics if "round/version" in m):  # the others tuned nothing
            name = "_" if i else "fine-tuning round"  # one entry in the legend for all of them
            ax.axvline(m["step"], color="tab:orange", alpha=0.35, linewidth=1, label=name)
        ax.grid(alpha=0.25)
        ax.set_xlim(0, max((m["step"] for m in metrics), default=0) or 1)
    if axes[0, 0].get_legend_handles_labels()[1]:
        axes[0, 0].legend(fontsize=8)
    path = run / "curves.png"
    try:
        with replacing(path) as file:
            figure.savefig(file, dpi=110, format="png")
    finally:
        plt.close(figure)
    return path


def _say_if_empty(*axes: "Axes", empty: bool) -> None:
    """Says so in a panel in which nothing is drawn, as of a run that is shorter than `log_every`."""
    if empty:
        axes[0].annotate(
            "nothing logged", (0.5, 0.5), xycoords="axes fraction", ha="center", color="tab:gray"
        )
        for each in axes:
            each.set_yticks([])
