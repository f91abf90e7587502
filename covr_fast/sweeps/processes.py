"""Runs as processes: so many at a time, stopped together, none lost because another died."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from ..checkpoint import has_checkpoint
from ..files import writing
from ..flags import flags
from ..run_folder import RunFolder
from ..saving import deferred_interrupts
from .states import State, SweepRun

_LOOK_EVERY = 0.5
"""Seconds between two looks at the processes."""


def command(run: SweepRun, threads: int | None = None) -> list[str]:
    """The command line of a run: begun, or resumed from its checkpoint.

    threads: of its policy updates, if the spec does not say.
    """
    planned, folder = run.planned, str(run.folder)
    base = [sys.executable, "-m", "covr_fast.cli", "train", planned.preset]
    chosen = {} if threads is None or "threads" in planned.asked else {"threads": threads}
    if has_checkpoint(run.folder):
        return [*base, *flags(chosen), "--resume", folder]
    return [*base, *flags(planned.asked | {"seed": planned.seed} | chosen), "--out", folder]


class Jobs:
    """Starts the waiting runs, at most `jobs` at a time.

    Each process has a session of its own, so that Ctrl-C reaches it once, from here: the run is saved then,
    and a later sweep resumes it. Where torch sees several GPUs and the spec names none, the runs take turns
    on them.

    A run that another process writes, such as the child of a sweep that was killed, is left to it. When that
    process ends while others still run here, the run is finished, or goes on here.

    Args:
        changed: is called after every look at the processes.
    """

    def __init__(
        self,
        runs: Sequence[SweepRun],
        jobs: int,
        changed: Callable[[], object],
        *,
        threads: int | None,
        gpus: int = 0,
    ) -> None:
        self._runs = runs
        self._waiting = [run for run in runs if run.state is State.WAITING]
        self._running: dict[int, tuple[SweepRun, subprocess.Popen[bytes]]] = {}
        self._jobs = jobs
        self._changed = changed
        self._threads = threads
        self._gpus = gpus

    def work(self) -> None:
        """Runs until none is left.

        Raises:
            KeyboardInterrupt: after every running process has saved its run and ended. A second Ctrl-C kills
                them.
        """
        with deferred_interrupts() as received:
            try:
                while (self._waiting or self._running) and not received:
                    for slot in range(self._jobs):
                        if slot not in self._running and self._waiting:
                            self._start(slot, self._waiting.pop(0))
                    self._look()
                    self._changed()
                    time.sleep(_LOOK_EVERY)
            finally:
                if self._running:
                    self._stop()
        if received:
            raise KeyboardInterrupt

    def _start(self, slot: int, run: SweepRun) -> None:
        if _left_to_others(run):  # another sweep into this folder may have begun or made it meanwhile
            return
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        _set_aside(run)
        here = dict(os.environ)
        if self._gpus > 1 and "device" not in run.planned.asked:
            given = here.get("CUDA_VISIBLE_DEVICES")
            visible = given.split(",") if given else [str(i) for i in range(self._gpus)]
            here["CUDA_VISIBLE_DEVICES"] = visible[slot % self._gpus]
        with writing(run.log), run.log.open("ab") as log:
            process = subprocess.Popen(
                command(run, self._threads),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=here,
                start_new_session=True,
            )
        run.state = State.RUNNING
        self._running[slot] = run, process

    def _look(self) -> None:
        for slot, (run, process) in list(self._running.items()):
            if process.poll() is not None:
                del self._running[slot]
                run.exit_code = process.returncode
                if not _left_to_others(run):  # they may have been quicker than this one
                    run.state = State.BROKEN
        for run in self._runs:
            if run.state is State.ELSEWHERE and not _left_to_others(run):
                run.state = State.WAITING
                self._waiting.append(run)

    def _stop(self) -> None:
        """Interrupts all, and waits: they save."""
        try:
            for _, process in self._running.values():
                process.terminate()  # not SIGINT, which a shell lets its background processes ignore
            for _, process in self._running.values():
                process.wait()
        except KeyboardInterrupt:
            for _, process in self._running.values():
                process.kill()
            raise
        finally:
            for run, _ in self._running.values():
                run.state = State.WAITING
            self._changed()


def _left_to_others(run: SweepRun) -> bool:
    """Whether a run without a process of ours needs none: it is finished, or another process writes it. Its
    state says which."""
    try:
        claimed = RunFolder(run.folder).is_claimed()  # first: its summary comes before it gives the folder up
    except OSError:
        claimed = False  # a process of ours will say what is wrong with the folder
    if run.has_ended():
        run.state = State.FINISHED
    elif claimed:
        run.state = State.ELSEWHERE
    else:
        return False
    return True


def _set_aside(run: SweepRun) -> None:
    """Renames what is left of a run that has nothing to go on from: it cannot be resumed, nor may it be
    overwritten."""
    if has_checkpoint(run.folder) or not RunFolder(run.folder).has_run():
        return
    number = 1
    while (aside := run.folder.with_name(f"{run.folder.name}.broken-{number}")).exists():
        number += 1
    run.folder.rename(aside)
