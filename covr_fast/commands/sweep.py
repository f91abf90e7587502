"""covr-fast sweep: many runs, by a file that says which."""

import contextlib
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from .common import check_least, interrupt_when_ended

if TYPE_CHECKING:
    from rich.console import Console

    from ..sweeps.states import SweepRun


def main(arguments: list[str]) -> int:
    import tyro

    from ..sweeps.spec import read_spec, shipped_specs

    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: covr-fast sweep SPEC [--seeds N] [--jobs N] [--out DIR] [--only GROUP ...]\n\nspecs:")
        for name, summary in shipped_specs().items():
            print(f"  {name:<20}{summary}")
        print(
            "\nSPEC is one of these, or a TOML file: docs/sweeps.md. covr-fast sweep SPEC --help lists all."
        )
        return 0 if arguments else 2

    @dataclass
    class Arguments:
        spec: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SPEC")]
        """A TOML file, or the name of a spec that comes with covr_fast."""
        seeds: int | None = None
        """Seeds 0 to N - 1 of each group. None: as the spec says."""
        jobs: int = 1
        """Runs at the same time. They share the cores."""
        out: Path | None = None
        """Folder of the runs: PRESET/GROUP/seed-N in it. None: sweeps/NAME. What is finished there is
        skipped, what was interrupted goes on."""
        only: tuple[str, ...] = ()
        """Only these groups."""
        presets: tuple[str, ...] = ()
        """These presets instead of those of the spec."""
        steps: int | None = None
        """Environment steps of each run, instead of what preset and spec say."""
        model: str | None = None
        """The VLM of each run, instead of what preset and spec say."""
        estimate: bool = True
        """Before it starts, time the parts of each group's loop and say how long the sweep will take."""
        dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
        """Say what would run, with its commands, and start nothing."""

    parsed = tyro.cli(
        Arguments,
        prog="covr-fast sweep",
        description="Run a grid of presets, agents, methods and seeds, each in a process of its own.",
        args=arguments,
    )
    check_least(parsed, jobs=1)
    for name in ("seeds", "steps"):
        if getattr(parsed, name) is not None:
            check_least(parsed, **{name: 1})
    from rich.console import Console

    from ..sweeps.processes import Jobs, command
    from ..sweeps.states import State, find_runs
    from ..sweeps.table import Progress
    from ..sweeps.timing import print_estimate

    spec = read_spec(
        parsed.spec,
        seeds=parsed.seeds,
        presets=parsed.presets,
        only=parsed.only,
        model=parsed.model,
        steps=parsed.steps,
    )
    out = parsed.out or Path("sweeps") / spec.name
    runs = find_runs(spec.runs, out)
    console = Console(highlight=False, soft_wrap=True)
    waiting = [run for run in runs if run.state is State.WAITING]
    finished = f", {len(runs) - len(waiting)} of them finished" if len(waiting) < len(runs) else ""
    at_once = f", {parsed.jobs} at a time" if parsed.jobs > 1 else ""
    count = "one run" if len(runs) == 1 else f"{len(runs)} runs"
    console.print(f"{spec.summary}: {count}{finished}, into {out}{at_once}")
    threads = _threads(parsed.jobs)
    if parsed.dry_run:
        for run in waiting:
            console.print(shlex.join(["covr-fast", *command(run, threads)[3:]]))
        return 0
    interrupt_when_ended()
    try:
        if parsed.estimate and waiting:
            print_estimate(waiting, parsed.jobs, threads, console)
        with Progress(runs, console) as progress:
            Jobs(runs, parsed.jobs, progress.update, threads=threads, gpus=_gpus()).work()
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # the terminal may be closed
            _name_unfinished(runs, console)
            done = sum(run.state is State.FINISHED for run in runs)
            console.print(
                f"{done} of {len(runs)} runs are finished: the same command goes on with the others"
            )
        raise
    unfinished = _name_unfinished(runs, console)
    console.print(f"covr-fast report {out} shows the runs")
    return 1 if unfinished else 0


def _name_unfinished(runs: "list[SweepRun]", console: "Console") -> int:
    """Prints the last lines of the runs that died, and which runs other processes write. Returns how many
    there are of both."""
    from ..sweeps.states import State

    elsewhere = [run for run in runs if run.state is State.ELSEWHERE]
    for run in elsewhere:
        console.print(
            f"{run.folder} is being written by another process: once that has ended, the same command goes on"
        )
    broken = [run for run in runs if run.state is State.BROKEN]
    for run in broken:
        console.print(f"{run.name} ended with exit code {run.exit_code}; the end of {run.log}:")
        for line in run.last_lines():
            console.print(f"  {line}", markup=False)
    if broken:
        console.print(f"{len(broken)} of {len(runs)} runs are broken: the same command tries them again")
    return len(broken) + len(elsewhere)


def _threads(jobs: int) -> int | None:
    """Threads of each run's updates, so that the runs share the cores. None: a single run chooses."""
    return None if jobs == 1 else max(1, (os.cpu_count() or 2) // jobs)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
