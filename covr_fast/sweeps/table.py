"""The live table of a sweep: a line per group, a column per seed."""

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..digits import spread_text
from .states import State, SweepRun

_FRAME = 6
"""Lines of the terminal that are not a group's."""


class Progress:
    """Shows how far the runs are: on a terminal as a table that changes, elsewhere as a line for each run
    that begins or ends."""

    def __init__(self, runs: Sequence[SweepRun], console: Console) -> None:
        self._runs = runs
        self._console = console
        self._shown = {id(run): run.state for run in runs}
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.update(table(self._runs), refresh=True)
            self._live.stop()

    def update(self) -> None:
        """Looks at the runs again."""
        if self._live:
            self._live.update(self._fitting(), refresh=True)
        for run in self._runs:
            if run.state is not self._shown[id(run)]:
                self._shown[id(run)] = run.state
                if not self._live:
                    self._console.print(self._line(run))

    def _fitting(self) -> RenderableType:
        """The table; where the terminal is too low for it, the lines of groups that are running, here or
        elsewhere, or broken, and how many runs are finished."""
        quiet = (State.WAITING, State.FINISHED)
        active = {run.group for run in self._runs if run.state not in quiet}
        if len({run.group for run in self._runs}) + _FRAME <= self._console.height:
            return table(self._runs)
        done = sum(run.state is State.FINISHED for run in self._runs)
        counted = Text(f"{done} of {len(self._runs)} runs are finished")
        return Group(table([run for run in self._runs if run.group in active]), counted)

    def _line(self, run: SweepRun) -> str:
        done = sum(each.state is State.FINISHED for each in self._runs)
        line = f"[{done}/{len(self._runs)}] {run.name} {_words(run)}"
        return line if run.state is not State.FINISHED else f"{line} in {run.result[2]:.0f} s"


def table(runs: Sequence[SweepRun]) -> Table:
    """A line per preset and group, a column per seed."""
    seeds = sorted({run.planned.seed for run in runs})
    shown = Table("preset", "group", *(f"seed {seed}" for seed in seeds))
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for run in runs:
        of = lines.setdefault(run.group, {})
        of[run.planned.seed] = _cell(run)
    for names, cells in lines.items():
        shown.add_row(*names, *(cells.get(seed, "") for seed in seeds))
    return shown


def _cell(run: SweepRun) -> str:
    if run.state is State.RUNNING:
        return f"{run.step() / run.planned.config.steps:.0%}"
    return _words(run)


def _words(run: SweepRun) -> str:
    if run.state is State.FINISHED:
        mean, std, _ = run.result
        return spread_text(mean, std, run.planned.config.eval.episodes)
    if run.state is State.BROKEN:
        return f"broken ({run.exit_code})"
    return str(run.state.value)
