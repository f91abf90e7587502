"""How the benchmarks compare contestants fairly.

- Nothing is timed before all contestants have computed the same result (`check_same`).
- Contestants run in turn, round by round (`race`): a busy machine is busy for all of them.
- A ratio is taken within each round. The tables give its median over the rounds and, in brackets, its
  quartiles.
- A table names the device, the versions and the date (`heading`).
- On a GPU a time is that of calls from Python, one after the other, so a short kernel shows Python's
  launches. What the device alone needs for a call (`on_device`) is given beside it.

COVR_BENCH_TINY=1 shrinks every size (`sized`), to see in seconds whether a benchmark runs at all. Such
figures mean nothing.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from covr_fast.machine import device_name, versions

Function = Callable[[], Any]
TINY = os.environ.get("COVR_BENCH_TINY") == "1"
PACKAGES = ("torch", "triton", "liger-kernel", "torchrl", "stable_baselines3", "tianshou", "cpprb")


def sized(full: Any, tiny: Any) -> Any:
    """The size of a benchmark, or of its rehearsal."""
    return tiny if TINY else full


def check_same(functions: Mapping[str, Function | str], same: Callable[[Any, Any], object]) -> None:
    """Calls each function once. `same` gets the first result and another; it returns False or raises where
    they differ."""
    results = {name: run() for name, run in functions.items() if not isinstance(run, str)}
    first = next(iter(results))
    for name, result in results.items():
        if same(results[first], result) is False:
            raise AssertionError(f"{name!r} does not compute what {first!r} does: nothing to time")


def peer(make: Callable[..., Function], *arguments: Any) -> Function | str:
    """The function that `make` returns, or the reason why it cannot be made on this machine."""
    try:
        return make(*arguments)
    except (ImportError, AttributeError, RuntimeError) as error:
        return " ".join(str(error).split())[:120]


def wall(function: Function, device: str = "cpu") -> float:
    """Seconds of one call, until a GPU has finished what the call launched."""
    begin = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def steady(function: Function, device: str = "cpu") -> float:
    """Seconds of a call that follows others like it; on a GPU the mean of ten calls between two events."""
    if device == "cpu":
        # After a parallel loop of torch, OpenMP's threads spin for about 10 ms and occupy the cores.
        time.sleep(0.02)
        first = wall(function)
        return first if first > 0.05 else wall(function)  # the first short call is a cold start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(10):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e4


def on_device(function: Function, calls: int = 10, *, record: bool = True) -> tuple[float, str] | None:
    """Seconds that the device needs for one call, and how they were measured; None if neither way works.

    "graph": `calls` of them recorded as one CUDA graph, the best of six replays. The gaps between the
    kernels of a call are in it, launches from Python are not. "kernels": the sum of the kernels and copies
    of a call in a profile, for functions that wait for the device, or with `record=False`. Measure with it
    last: a failed recording may leave the default generator unusable.
    """
    if record:
        try:
            return _replayed(function, calls), "graph"
        except RuntimeError:
            torch.cuda.synchronize()
    try:
        seconds = _profiled(function, calls)
    except RuntimeError:
        return None
    return (seconds, "kernels") if seconds else None  # a machine may keep profilers from the device


def _replayed(function: Function, calls: int) -> float:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):  # which a failed recording would leave current
        for _ in range(3):  # what is made once only is made before the recording
            function()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=side):
            for _ in range(calls):
                function()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replay() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    return min(replay() for _ in range(6))


def _profiled(function: Function, calls: int) -> float:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    kernels = (
        event for event in profile.key_averages() if event.device_type != torch.autograd.DeviceType.CPU
    )
    return sum(event.self_device_time_total for event in kernels) / 1e6 / calls


def race(
    functions: Mapping[str, Function | str],
    rounds: int,
    timer: Callable[[Function], float] = wall,
    *,
    warmups: int = 1,
    benchmark: Any = None,
) -> dict[str, Any]:
    """Times every function once a round.

    Args:
        functions: by name; a string instead of a function is the reason why it cannot run.
        timer: calls a function and returns seconds.
        warmups: rounds before those that count.
        benchmark: the fixture of pytest-benchmark. Its own report is about the first function alone, which it
            calls once more after every round.

    Returns:
        a row of `table`: "seconds", the median by name; "ratio", the quartiles by name of the time over that
        of the first function in the same round; "unavailable", the reasons by name.
    """
    running = {name: run for name, run in functions.items() if not isinstance(run, str)}
    times: dict[str, list[float]] = {name: [] for name in running}

    def one_round() -> None:
        for name, run in running.items():
            times[name].append(timer(run))

    first, *others = running
    if benchmark:
        benchmark.pedantic(running[first], setup=one_round, rounds=rounds, warmup_rounds=warmups)
    else:
        for _ in range(warmups + rounds):
            one_round()
    times = {name: values[warmups:] for name, values in times.items()}
    ratios = {name: [a / b for a, b in zip(times[name], times[first], strict=True)] for name in others}
    return {
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        # Twice, because one round alone has no quartiles.
        "ratio": {name: statistics.quantiles(2 * values, n=4) for name, values in ratios.items()},
        "unavailable": {name: why for name, why in functions.items() if isinstance(why, str)},
    }


def heading(device: str = "cpu", packages: Sequence[str] = PACKAGES) -> str:
    named = ", ".join(" ".join(pair) for pair in versions(packages).items())
    return f"{device_name(device)}; {time.strftime('%Y-%m-%d')}; {named}.\n"


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Races as Markdown, a line per contestant.

    Args:
        rows: by name, what `race` returns and, if known, of a call of the first contestant: "limit", the
            seconds that the hardware allows; "on_device", what `on_device` returns; "items"; "operations";
            "extra_bytes", the peak of memory beyond the gradients that it returns.
    """
    lines = ["| row | contestant | time | ratio to the first |", "| --- | --- | --- | --- |"]
    for row, info in rows.items():
        for name, seconds in info["seconds"].items():
            took = _time(seconds)
            rate = f", {info['items'] / seconds:,.0f}/s" if info.get("items") else ""
            last = _ratio(*info["ratio"][name]) if name in info["ratio"] else _notes(info, seconds)
            lines.append(f"| {row} | {name} | {took}{rate} | {last} |")
        lines += [f"| {row} | {name} | not measured: {why} | |" for name, why in info["unavailable"].items()]
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _ratio(low: float, median: float, high: float) -> str:
    return f"{median:.2f}x ({low:.2f} to {high:.2f})"


def _notes(info: Mapping[str, Any], seconds: float) -> str:
    notes = []
    if info.get("limit"):
        notes.append(f"{info['limit'] / seconds:.0%} of the limit")
    if info.get("on_device"):
        alone, how = info["on_device"]
        share = f", {info['limit'] / alone:.0%} of the limit" if info.get("limit") else ""
        notes.append(f"{_time(alone)} on the device ({how}){share}")
    if info.get("operations"):
        notes.append(f"{info['operations'] / seconds / 1e12:.3g} TFLOP/s")
    if info.get("extra_bytes"):
        notes.append(f"{info['extra_bytes'] / 2**20:.0f} MiB beyond the gradients")
    return ", ".join(notes)


def rows_of(file: Path) -> dict[str, dict[str, Any]]:
    """The races in a JSON file of pytest-benchmark or of `write_rows`, by row."""
    content: dict[str, Any] = json.loads(file.read_text())
    if "benchmarks" not in content:
        return content
    return {entry["name"].removeprefix("test_"): entry["extra_info"] for entry in content["benchmarks"]}


def write_rows(file: Path | None, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes races, if there is a file to write them to. `rows_of` reads them."""
    if file:
        file.write_text(json.dumps(rows))


def main(suite: str, file: Path) -> int:
    """Runs a suite under pytest-benchmark into `file` (JSON), and leaves its table beside it as Markdown."""
    import pytest

    status = pytest.main([suite, "-q", "-p", "no:cacheprovider", f"--benchmark-json={file}"])
    if status == 0:
        file.with_suffix(".md").write_text(f"{heading()}\n{table(rows_of(file))}\n")
    return int(status)
