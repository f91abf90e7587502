"""What a user looks at after a run: the summary tables and curves.png, made from the run folder."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .errors import UserError
from .files import full_names, read_json, read_records, replacing

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
_MOST_SETTINGS = 4  # in a label
IGNORED = {"log_every", "video", "checkpoint_minutes", "checkpoint_every", "save_replay"}  # in labels


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


def run_labels(runs: Sequence[Path]) -> list[str]:
    """A label per run: the shortest end of its path that is unique, and the settings in which the runs
    differ."""
    settings = [_settings(run) for run in runs]
    names = dict.fromkeys(name for own in settings for name in own if name not in IGNORED)
    differing = [name for name in names if len({str(own.get(name)) for own in settings}) > 1]
    labels = []
    for name, own in zip(shortest_names(runs), settings, strict=True):
        named = [f"{setting}={own.get(setting)}" for setting in differing[:_MOST_SETTINGS]]
        more = [f"{len(differing) - _MOST_SETTINGS} more"] if len(differing) > _MOST_SETTINGS else []
        labels.append(", ".join([name, *named, *more]))
    return labels


def _settings(run: Path) -> dict[str, Any]:
    """The settings in config.json, written by any version; none if there is no such file."""
    path = run / "config.json"
    return full_names(read_json(path, "put back a copy of it")) if path.is_file() else {}


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
            table.add_row(label, f"{e['mean']:.1f}", f"{e['std']:.1f}", str(len(e["returns"])))
    console.print(table)

    if summary["rounds"]:
        table = new_table("fine-tuning rounds of the VLM", [], ROUND_COLUMNS)
        for r in summary["rounds"]:
            table.add_row(*(form.format(r[key]) if key in r else "-" for key, form in ROUND_COLUMNS.values()))
        console.print(table)

    shares = sorted(summary["time_shares"].items(), key=lambda item: -item[1])
    console.print(
        f"{summary['steps']} environment steps ({summary['decisions']} decisions), "
        f"{summary['updates']} updates, {summary['episodes']} episodes in {summary['seconds']:.0f} s on "
        f"{summary['device']}: {summary['steps_per_second']:.0f} steps/s"
    )
    console.print("wall time: " + ", ".join(f"{name} {share:.0%}" for name, share in shares))


def print_comparison(labels: Sequence[str], summaries: Sequence[dict[str, Any]], console: Console) -> None:
    """Prints one line per run, and the mean and standard deviation over runs of one environment."""
    table = new_table("runs compared: mean episode returns", ["run"], EVALUATIONS.values())
    means = {
        name: [s["evaluations"][name]["mean"] for s in summaries if name in s["evaluations"]]
        for name in EVALUATIONS
    }
    for label, s in zip(labels, summaries, strict=True):
        cells = [f"{s['evaluations'][n]['mean']:.1f}" if n in s["evaluations"] else "-" for n in EVALUATIONS]
        table.add_row(label, *cells)
    if len({s["environment"] for s in summaries}) == 1:
        table.add_section()
        table.add_row("all", *(f"{np.mean(v):.1f} ± {np.std(v):.1f}" if v else "-" for v in means.values()))
    console.print(table)


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

    rounds = [m for m in metrics if "round/loss_after" in m]
    ax = axes[0, 0]
    ax.plot(*series("episode_return"), color="tab:blue", label="training episodes")
    for (name, label), colour in zip(
        EVALUATIONS.items(), ("tab:gray", "tab:olive", "tab:orange", "tab:green"), strict=True
    ):
        _, means = series(f"eval/{name}_mean")
        if means:
            ax.axhline(
                means[-1], color=colour, linestyle="--", linewidth=1.2, label=f"{label}: {means[-1]:.0f}"
            )
    ax.set(title="episode return", xlabel="environment steps", ylabel="sum of rewards")

    ax = axes[0, 1]
    where = list(range(len(rounds)))
    for offset, when, colour in ((-0.2, "before", "tab:gray"), (0.2, "after", "tab:orange")):
        losses = [m[f"round/loss_{when}"] for m in rounds]
        ax.bar([x + offset for x in where], losses, 0.38, label=when, color=colour)
    ax.set(title="VLM loss on held-out kept samples", xlabel="fine-tuning round", ylabel="nats per token")
    ax.set_xticks(where, [f"{m['round/round']:.0f}" for m in rounds])
    ax.legend(fontsize=8)

    ax = axes[1, 0]
    ax.plot(*series("q"), color="tab:blue")
    ax.set(title="mean Q and policy entropy", xlabel="environment steps")
    ax.set_ylabel("Q", color="tab:blue")
    twin = ax.twinx()
    twin.plot(*series("entropy"), color="tab:red")
    twin.set_ylabel("entropy / nats", color="tab:red")

    ax = axes[1, 1]
    names = sorted({name for m in metrics for name in m if name.startswith("time/")})
    last = next((m for m in reversed(metrics) if "time/other" in m), {})
    names = sorted(names, key=lambda n: last.get(n, 0.0))
    ax.barh([n.removeprefix("time/") for n in names], [last.get(n, 0.0) for n in names], color="tab:blue")
    ax.set(title="where the time went", xlabel="share of wall time", xlim=(0, 1))

    for ax in (axes[0, 0], axes[1, 0]):
        for i, m in enumerate(m for m in metrics if "round/version" in m):  # the others tuned nothing
            name = "_" if i else "fine-tuning round"  # one entry in the legend for all of them
            ax.axvline(m["step"], color="tab:orange", alpha=0.35, linewidth=1, label=name)
        ax.grid(alpha=0.25)
        ax.set_xlim(left=0)
    axes[0, 0].legend(fontsize=8)
    path = run / "curves.png"
    try:
        with replacing(path) as file:
            figure.savefig(file, dpi=110, format="png")
    finally:
        plt.close(figure)
    return path
