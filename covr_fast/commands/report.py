"""covr-fast report: what runs came to, on the console and as a page."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..errors import UserError, as_user_error

if TYPE_CHECKING:
    from rich.console import Console

    from ..reporting.groups import Study

_MOST_IN_FULL = 4
"""Runs whose whole summaries are printed; of more, a line each."""


def main(arguments: list[str]) -> int:
    import tyro

    @dataclass
    class Arguments:
        runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
        """Run folders, or folders above them, such as a sweep's."""
        out: Path = Path("report.html")
        """The page to write: one HTML file that needs no network."""

    parsed = tyro.cli(
        Arguments,
        prog="covr-fast report",
        description="Print runs' summaries, compare them, redraw their curves, and write a page about all.",
        args=arguments,
    )
    if not parsed.runs:
        raise UserError("report needs at least one run folder: covr-fast report runs/carracing-seed0")

    from rich.console import Console

    from ..reporting.console import print_problems
    from ..reporting.groups import read_study
    from ..reporting.page import check_writable, write_page

    check_writable(parsed.out)
    study = read_study(parsed.runs)
    console = Console(highlight=False, soft_wrap=True)
    _print_runs(study, console)
    _draw_curves(study)
    print_problems(study, console)
    size = write_page(study, parsed.out)
    print(f"page: {parsed.out} ({size / 1e6:.1f} MB)")
    return 0


def _print_runs(study: "Study", console: "Console") -> None:
    from ..report import print_summary, shortest_names
    from ..reporting.console import print_study

    runs = [run for run in study.runs if not run.lacks]
    if len(runs) < len(study.runs) or len(runs) > _MOST_IN_FULL:
        print_study(study, console)
        return
    if len(runs) == 1:
        print_summary(runs[0].summary, console)
        return
    labels = [group.label for group in study.groups for _ in group.runs]
    names = shortest_names([run.folder for run in runs])
    for run, name, label in zip(runs, names, labels, strict=True):
        print_summary(run.summary, console, f"{name}, {label}")
    print_study(study, console)


def _draw_curves(study: "Study") -> None:
    """Draws curves.png of every finished run; the others may be running."""
    from ..report import plot_curves

    drawn = 0
    for run in study.runs:
        if run.metrics:
            with as_user_error():
                path = plot_curves(run.folder)
            drawn += 1
    if drawn:
        print(f"drawn: {path}" if drawn == 1 else f"drawn: curves.png in {drawn} run folders")
