"""covr-fast report: what runs came to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..errors import UserError, as_user_error


def main(arguments: list[str]) -> int:
    import tyro

    @dataclass
    class Arguments:
        runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
        """Folders of finished runs."""

    parsed = tyro.cli(
        Arguments,
        prog="covr-fast report",
        description="Print runs' summaries, compare them, and redraw their curves.",
        args=arguments,
    )
    from rich.console import Console

    from ..files import read_records
    from ..report import plot_curves, print_comparison, print_summary, read_summary, run_labels

    if not parsed.runs:
        raise UserError("report needs at least one run folder: covr-fast report runs/carracing-seed0")
    console = Console(highlight=False, soft_wrap=True)
    summaries = [read_summary(run) for run in parsed.runs]
    labels = run_labels(parsed.runs)
    several = len(parsed.runs) > 1
    for run, label, summary in zip(parsed.runs, labels, summaries, strict=True):
        print_summary(summary, console, label if several else None)
        with as_user_error():
            print(f"drawn: {plot_curves(run)}")
        if read_records(run / "metrics.jsonl")[1]:
            print(f"{run / 'metrics.jsonl'}: its last line is torn and was left out")
    if several:
        print_comparison(labels, summaries, console)
    return 0
