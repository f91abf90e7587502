"""What a run writes while it trains: metrics.jsonl, TensorBoard events, and its progress on the console."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, Self, TextIO, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from torch import Tensor

from .files import drop_lines_after, writing


class Clock:
    """Adds up wall time by activity. Activities do not nest: each second is counted once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._earlier = 0.0
        self.start()

    def start(self) -> None:
        """Counts the total from now on, after that of the run's earlier parts (`load_state_dict`)."""
        self._started = time.perf_counter() - self._earlier

    @contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[activity] = self.seconds.get(activity, 0.0) + time.perf_counter() - start

    @property
    def total(self) -> float:
        return time.perf_counter() - self._started

    def shares(self) -> dict[str, float]:
        """Share of the whole wall time, by activity; "other" is the rest."""
        total = self.total
        shares = {name: seconds / total for name, seconds in self.seconds.items()}
        return {**shares, "other": max(0.0, 1 - sum(shares.values()))}

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "total_seconds": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds, self._earlier = state["seconds"], state["total_seconds"]
        self.start()


class MeanMetrics:
    """Means that stay on the device of their values, so the host does not wait for it until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Adds one value per metric: a scalar, or the mean of a larger tensor."""
        known: list[tuple[Tensor, Tensor]] = []
        for name, given in metrics.items():
            value = given.detach().float()
            value = value.mean() if value.ndim else value
            if name in self._sums:
                known.append((self._sums[name], value))
            else:
                self._sums[name] = value.clone()
            self._counts[name] = self._counts.get(name, 0) + 1
        if known:
            sums, values = zip(*known, strict=True)
            torch._foreach_add_(sums, values)  # one launch

    def read(self) -> dict[str, float]:
        """The means since the last read, in one transfer. Then counting starts again."""
        if not self._sums:
            return {}
        values = torch.stack(list(self._sums.values())).tolist()
        means = {name: v / self._counts[name] for name, v in zip(self._sums, values, strict=True)}
        self._sums, self._counts = {}, {}
        return means


class _Lasting:
    """A text stream that may break (a closed pipe or terminal, a full disk): later text is lost, and the run
    goes on."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._broken = False

    def write(self, text: str) -> int:
        return self._unless_broken(lambda: self._stream.write(text)) or len(text)

    def flush(self) -> None:
        self._unless_broken(self._stream.flush)

    def _unless_broken(self, call: Callable[[], int | None]) -> int | None:
        try:
            return None if self._broken else call()
        except (OSError, ValueError):  # ValueError: closed
            self._broken = True
            return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def display() -> Console:
    """Standard output; a run goes on if it breaks."""
    stream = cast(TextIO, _Lasting(sys.stdout)) if sys.stdout else None
    return Console(file=stream, highlight=False, soft_wrap=True)


class RunLogger:
    """Writes the metrics of a run and shows its progress.

    On a terminal: a live bar with ETA and the key figures. Elsewhere (a file, a CI log): a plain line every
    PLAIN_INTERVAL seconds, without control characters.
    """

    PLAIN_INTERVAL = 15.0

    def __init__(
        self, folder: Path, total: int, clock: Clock, *, start: int = 0, console: Console | None = None
    ):
        # Imported here: TensorBoard takes a second to load.
        from torch.utils.tensorboard import SummaryWriter

        self.console = console or display()
        self.clock = clock
        self.folder = folder
        self._path = folder / "metrics.jsonl"
        if self._path.exists() and drop_lines_after(self._path, start):
            self.say(f"{self._path}: its last line was torn and is dropped")
        self._file = self._path.open("a")
        self._events = SummaryWriter(str(folder), purge_step=start + 1)
        self._previous_hook = threading.excepthook
        threading.excepthook = self._thread_failed
        self._total = total
        self._last_line = 0.0
        # Step and seconds of the first progress line: the time before it went into loading and evaluation.
        self._pace: tuple[int, float] | None = None
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if self.console.is_terminal:
            whole = partial(Column, no_wrap=True, min_width=7)
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=12),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(table_column=whole()),
                TextColumn("ETA"),
                TimeRemainingColumn(table_column=whole()),
                # On a narrow terminal these are cut off.
                TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True, ratio=1)),
                console=self.console,
            )
            self._task = self._progress.add_task("COVR", total=total, completed=start, figures="")
            self._progress.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line to metrics.jsonl and the same figures to TensorBoard."""
        record = {"step": step, "seconds": round(self.clock.total, 3)}
        with writing(self._path):
            self._file.write(json.dumps({**record, **values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def progress(self, step: int, figures: Mapping[str, str]) -> None:
        """Moves the bar, or prints a line if PLAIN_INTERVAL has passed since the last."""
        text = "  ".join(f"{name} {value}" for name, value in figures.items())
        if self._progress:
            self._progress.update(self._task, completed=step, figures=text)
            return
        now = time.perf_counter()
        if now - self._last_line < self.PLAIN_INTERVAL and step < self._total:
            return
        self._last_line = now
        elapsed = self.clock.total
        self._pace = since_step, since = self._pace or (step, elapsed)
        done = step - since_step
        left = f"{(elapsed - since) * (self._total - step) / done:.0f}" if done else "?"
        self.console.print(f"{step:>8}/{self._total} steps  {elapsed:5.0f} s  ETA {left:>4} s  {text}")

    def say(self, text: str) -> None:
        """Prints a line that stays, above the bar."""
        self.console.print(text)

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        """Prints no traceback for a failed write in TensorBoard's thread, which the next call raises
        anyway."""
        writer = type(failed.thread).__module__.startswith("tensorb")
        if not (writer and isinstance(failed.exc_value, OSError)):
            self._previous_hook(failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self._progress:
            self._progress.stop()
        # After an error, a second one that closing causes is not reported.
        with suppress(OSError) if error else nullcontext(), writing(self._path), self._file:
            try:
                self._events.close()
            finally:
                threading.excepthook = self._previous_hook
