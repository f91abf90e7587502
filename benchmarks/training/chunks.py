"""A contestant trains in a process of its own, and only while it is asked to.

Every process has its own threads, allocator and OpenGL. Between two chunks of training it waits for the next
command, so that others have the machine for themselves.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

Facts = dict[str, Any]


class Progress(NamedTuple):
    """Of a contestant since its start."""

    decisions: int
    updates: int
    seconds: Mapping[str, float]
    """By activity."""


class Chunk(NamedTuple):
    """What a contestant did while it was timed."""

    decisions: int
    updates: int
    took: float
    cpu: float
    """Seconds of processors, with those of the processes of its environments."""
    seconds: Mapping[str, float]
    """By activity; the rest of `took` is spent elsewhere."""


class Stop(BaseException):
    """Ends a contestant from within its loop. No Exception: a loop would save what it has before it ends."""


class Pauses:
    """Called by a contestant's loop at each of its steps.

    Args:
        connection: commands come and chunks go there.
        ready_at: decisions after which the first command is awaited.
        settle: steps of the loop before the clock starts. What is simulating while the loop waits is not
            counted: as many steps as batches of environments are in flight.
    """

    def __init__(self, connection: Connection, ready_at: int, settle: int):
        self._connection, self._ready_at, self._settle = connection, ready_at, settle
        self._begin: Progress | None = None
        self._skip = 0
        self._duration = 0.0

    def __call__(self, now: Progress, facts: Callable[[], Facts]) -> None:
        """`facts` checks the contestant and says what it trains, when the warm-up is over."""
        if self._duration == 0:
            if now.decisions >= self._ready_at:
                self._connection.send(facts())
                self._await()
        elif self._begin is None:
            self._skip -= 1
            if self._skip <= 0:
                self._begin, self._began, self._cpu = now, time.perf_counter(), cpu_seconds()
        elif (took := time.perf_counter() - self._began) >= self._duration:
            begin = self._begin
            spent = {name: now.seconds[name] - begin.seconds.get(name, 0.0) for name in now.seconds}
            decisions, updates = now.decisions - begin.decisions, now.updates - begin.updates
            self._connection.send(Chunk(decisions, updates, took, cpu_seconds() - self._cpu, spent))
            self._await()

    def _await(self) -> None:
        command = self._connection.recv()
        if command is None:
            raise Stop
        self._duration, self._begin, self._skip = command, None, self._settle


def cpu_seconds() -> float:
    """What this process and its living children have used of the processors (Linux)."""
    seconds = time.process_time()
    for child in multiprocessing.active_children():
        user, system = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        seconds += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return seconds


class Contestant:
    """A process that trains. `train(connection, *arguments)` runs in it."""

    def __init__(self, train: Callable[..., None], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_guarded, args=(other, train, *arguments))
        self._process.start()
        other.close()
        self.chunks: list[Chunk] = []

    def facts(self) -> Facts:
        """Waits for the end of the warm-up.

        Raises:
            RuntimeError: it cannot train on this machine.
            AssertionError: it does not do what it should.
        """
        return dict(self._receive())

    def chunk(self, seconds: float) -> Chunk:
        """Lets it train for so long, at least one step of its loop."""
        self._connection.send(seconds)
        chunk = Chunk(*self._receive())
        self.chunks.append(chunk)
        return chunk

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise RuntimeError("the process ended without a word") from None
        if isinstance(answer, AssertionError):
            raise answer
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self._connection.send(None)
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()


def _guarded(connection: Connection, train: Callable[..., None], *arguments: Any) -> None:
    """Runs a contestant. What goes wrong is told to the parent process."""
    try:
        with suppress(Stop):
            train(connection, *arguments)
    except Exception as error:
        traceback.print_exc()
        failed = isinstance(error, AssertionError)
        connection.send(AssertionError(str(error)) if failed else f"{type(error).__name__}: {error}")
