"""What it gains to launch a policy update as one CUDA graph, to compile it, or both.

    python benchmarks/bench_update.py [--device cuda] [--preset NAME] [--threads N] [--json FILE]

Every kind of agent makes guided updates on one batch, in turn; medians are compared. None is timed whose Q
is another than the eager agent's after ten updates. What is compiled stays in a cache on disk, and in the
process for the next agent: for the seconds of a first time, set TORCHINDUCTOR_CACHE_DIR to an empty folder.
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from covr_fast import ReplayBuffer, TrainConfig
from covr_fast.agents import SAC
from covr_fast.buffer import Batch
from covr_fast.view import agent_obs_shape

KINDS = {
    "eager": {},
    "graph": {"graph": True},
    "compile": {"compile": True},
    "compile + graph": {"compile": True, "graph": True},
}


def medians(candidates: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The median of what each candidate returns, asked in turn."""
    values: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            values[name].append(run())
    return {name: statistics.median(v) for name, v in values.items()}


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"


def facts(device: str) -> dict[str, object]:
    """Where and with what figures were measured."""
    return {
        "device": device_name(device),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def policy(config: TrainConfig, device: str) -> tuple[SAC, Callable[[], Batch]]:
    """The preset's agent, and batches of its size from a replay buffer of noise."""
    replay, shape = config.replay, config.env.obs_shape
    extras = {"prior": (2,), "prior_mask": ()}
    buffer = ReplayBuffer(
        1024, num_envs=8, obs_shape=shape, action_shape=(2,), n_step=replay.n_step, extras=extras,
        device=device, seed=0,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for _ in range(128):
        obs, after = rng.integers(0, 256, (2, 8, *shape), dtype=np.uint8)
        action = rng.uniform(-1, 1, (8, 2)).astype(np.float32)
        ended = np.ones(8, bool)
        buffer.add(obs, action, ended, after, ended, ~ended, prior=action, prior_mask=np.ones(8))
    agent = SAC(agent_obs_shape(config), (2,), config.agent, device=device)

    def sample() -> Batch:
        return buffer.sample(
            replay.batch_size, augment="crop", pad=replay.pad, memory_format=torch.channels_last
        )

    return agent, sample


def updates(preset: str, device: str, repeats: int) -> dict[str, dict[str, float]]:
    """By kind of agent: milliseconds per update, and seconds of its first ten (compiling and recording)."""
    count = 100 if device == "cuda" else 40
    runs: dict[str, Callable[[], float]] = {}
    first: dict[str, float] = {}
    expected: float | None = None
    for name, options in KINDS.items():
        if "graph" in options and device != "cuda":
            continue
        config = TrainConfig.preset(preset)
        vars(config.agent).update(options)
        agent, sample = policy(config, device)
        batch = sample()

        def run(agent: SAC = agent, batch: Batch = batch, times: int = count) -> float:
            for _ in range(times):
                q = agent.update(batch, guide=True)["q"]
            return q.item()  # waits for what a GPU was told to do

        began = time.perf_counter()
        q = run(times=10)
        first[name] = time.perf_counter() - began
        expected = q if expected is None else expected
        if not math.isclose(expected, q, rel_tol=1e-2, abs_tol=1e-3):
            raise SystemExit(f"mean Q after 10 updates is {q} with {name}, {expected} eager: nothing to time")
        runs[name] = lambda run=run: 1e3 * timed(run) / count
    took = medians(runs, repeats)
    return {name: {"ms": took[name], "first_seconds": first[name]} for name in runs}


def line(found: dict[str, dict[str, float]]) -> str:
    eager = found["eager"]["ms"]
    kinds = [f"{name} {f['ms']:.2f} ms ({eager / f['ms']:.2f}x)" for name, f in found.items()]
    return "an update takes " + ", ".join(kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", help="carracing on a CPU and carracing-gpu on a GPU if not given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    preset = arguments.preset or ("carracing-gpu" if arguments.device == "cuda" else "carracing")
    found = updates(preset, arguments.device, arguments.repeats)
    print(f"{preset}: {line(found)}")
    print(
        "its first ten take " + ", ".join(f"{name} {f['first_seconds']:.1f} s" for name, f in found.items())
    )
    if arguments.json:
        what = {"preset": preset, "threads": arguments.threads, "update": found}
        arguments.json.write_text(json.dumps({**facts(arguments.device), **what}, indent=2) + "\n")


if __name__ == "__main__":
    main()
