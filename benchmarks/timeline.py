"""A picture of who computed when: a row per CUDA stream or, without a GPU, per thread of a profile."""

import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch


class Span(NamedTuple):
    row: str
    begin: float
    """Seconds."""
    length: float


def record(work: dict[str, Callable[[], object]], device: str) -> list[Span]:
    """Runs all of `work` at once, each in a thread of that name, and returns what was computed when.

    A row is a thread, those that the work starts included, or on a GPU a stream, with the threads that queued
    kernels on it.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    every_thread = torch.profiler._ExperimentalConfig(profile_all_threads=True)
    names: dict[int, str] = {}
    others = threading.enumerate()
    threads = [threading.Thread(target=function, name=name) for name, function in work.items()]
    with torch.profiler.profile(activities=activities, experimental_config=every_thread) as profiler:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            new = [thread for thread in threading.enumerate() if thread not in others]
            names |= {thread.native_id: thread.name for thread in new if thread.native_id}
            time.sleep(0.001)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    return spans(events, names)


def spans(events: list[dict], names: dict[int, str]) -> list[Span]:
    """What a trace says was computed, kernels if there are any and operators otherwise.

    Args:
        events: of a Chrome trace, times in microseconds.
        names: of threads, by their number; threads without a name are left out.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    kernels = [event for event in complete if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if kernels:
        rows = _stream_rows(complete, kernels, names)
        chosen = [(rows[event["args"]["stream"]], event) for event in kernels]
    else:
        operators = [event for event in complete if event.get("cat") == "cpu_op" and event["tid"] in names]
        chosen = [(names[event["tid"]], event) for event in operators]
    start = min((event["ts"] for _, event in chosen), default=0.0)
    return [Span(row, (event["ts"] - start) / 1e6, event["dur"] / 1e6) for row, event in chosen]


def _stream_rows(complete: list[dict], kernels: list[dict], names: dict[int, str]) -> dict[int, str]:
    """The name of each stream's row: its number, and whose threads launched its kernels."""
    launcher = {
        event["args"]["correlation"]: names[event["tid"]]
        for event in complete
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and event["tid"] in names
    }
    users: dict[int, set[str]] = {}
    for event in kernels:
        by = launcher.get(event["args"].get("correlation"))
        users.setdefault(event["args"]["stream"], set()).update([by] if by else [])
    return {stream: f"stream {stream}: {', '.join(sorted(by)) or 'others'}" for stream, by in users.items()}


def draw(found: list[Span], title: str, out: Path) -> None:
    """Writes the picture: a row per stream or thread, dark where it computes; the title says what ran."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted({span.row for span in found})
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.5 * len(rows)), layout="constrained")
    for at, row in enumerate(rows):
        bars = [(span.begin, span.length) for span in found if span.row == row]
        axes.broken_barh(bars, (at - 0.35, 0.7), facecolors=f"C{at}", linewidth=0)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title(title, fontsize=10)
    figure.savefig(out, dpi=120)
    plt.close(figure)
