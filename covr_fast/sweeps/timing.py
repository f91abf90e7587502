"""How long a sweep takes: each group's loop is timed, in a process that gives its memory back."""

import json
import subprocess
import sys
from collections.abc import Sequence

from rich.console import Console

from ..bench import CheckFailedError, measure
from ..config import TrainConfig
from ..costs import in_words
from ..errors import UserError
from ..estimate import run_seconds
from .states import SweepRun

_SECONDS = 0.2
"""How long each part is timed."""


def print_estimate(waiting: Sequence[SweepRun], jobs: int, threads: int | None, console: Console) -> None:
    """Prints how long a run of each group takes, and the waiting runs together. A run that was interrupted
    counts with the steps that are left."""
    seconds: dict[tuple[str, str], float | None] = {}
    total, longest = 0.0, 0.0
    for run in waiting:
        config = run.planned.config
        if run.group not in seconds:
            seconds[run.group] = _timed(config, threads, "  " + ", ".join(run.group), console)
        left = (1 - run.step() / config.steps) * (seconds[run.group] or 0.0)
        total, longest = total + left, max(longest, left)
    what = "one run" if len(waiting) == 1 else f"{len(waiting)} runs"
    known = "" if None not in seconds.values() else ", without those that could not be timed"
    console.print(f"estimated: {in_words(max(longest, total / jobs))} for {what}{known}")


def _timed(config: TrainConfig, threads: int | None, name: str, console: Console) -> float | None:
    """Seconds of a run; None if it could not be timed, which the run itself will explain."""
    settings = config.to_dict() | {"threads": config.threads or threads or 0}
    here = [sys.executable, "-m", __spec__.name]
    done = subprocess.run(here, input=json.dumps(settings), capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        console.print(f"{name}: not timed ({lines[-1] if lines else 'no reason given'})", markup=False)
        return None
    taken = float(done.stdout.splitlines()[-1])
    console.print(f"{name}: {in_words(taken)} a run, by its parts timed alone")
    return taken


def main() -> int:
    """Reads settings from the standard input, and prints the seconds of a run with them."""
    config = TrainConfig.from_dict(json.load(sys.stdin))
    try:
        figures = measure(config, _SECONDS, sizes=False)
    except (UserError, CheckFailedError, OSError, MemoryError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    print(run_seconds(config, figures)["total"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
