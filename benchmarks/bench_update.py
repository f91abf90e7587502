"""What it gains to launch a policy update as one CUDA graph, to compile it, or both.

    python benchmarks/bench_update.py [--device cuda] [--preset NAME] [--augment shift | --agents rad drq] \\
        [--threads N] [--json FILE] [> FILE.md]

Every kind of agent makes guided updates on one batch. None is timed whose Q differs from the eager agent's
after ten updates, by more than 3 % or, with bfloat16 convolutions, 15 %. Then updates on batches that are
sampled for each. Compiled code stays in a cache on disk, and in the process for the next agent: for the
seconds of a first time, set TORCHINDUCTOR_CACHE_DIR to an empty folder.
"""

import argparse
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from race import check_same, heading, on_device, race, sized, table, wall, write_rows

from covr_fast import ReplayBuffer, TrainConfig
from covr_fast.agents import Agent, make_agent
from covr_fast.buffer import Batch
from covr_fast.buffer.sampling import Sampling
from covr_fast.parts import new_batches, use_tensor_cores
from covr_fast.view import agent_obs_shape

KINDS = {
    "eager": {"graph": False},
    "graph": {"graph": True},
    "bfloat16 graph": {"graph": True, "encoder_dtype": "bfloat16"},
    "compile": {"graph": False, "compile": True},
    "compile + graph": {"compile": True, "graph": True},
}


class Case(NamedTuple):
    """Of whom the updates are."""

    preset: str
    agent: str | None
    """The published one with this name, with its own augmentation; else that of the preset."""
    augment: Literal["none", "shift", "crop", "translate"]


def policy(config: TrainConfig, device: str) -> tuple[Agent, Callable[[], Batch]]:
    """The preset's agent, and batches of its size from a replay buffer of noise."""
    agent, sampling = drawing_policy(config, device)
    return agent, sampling.sample


def drawing_policy(config: TrainConfig, device: str) -> tuple[Agent, Sampling]:
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
    agent = make_agent(agent_obs_shape(config), (2,), config.agent, device=device)
    replay.batch_size = sized(replay.batch_size, 8)
    return agent, new_batches(config, buffer)


def settings(case: Case, kind: str) -> TrainConfig:
    config = TrainConfig.preset(case.preset, agent=case.agent)
    if case.agent is None:
        config.replay.augment = case.augment
    vars(config.agent).update(KINDS[kind])
    return config


def compare_updates(case: Case, device: str, repeats: int, kinds: Iterable[str]) -> dict[str, Any]:
    """Seconds per update by kind of agent, and of its first ten updates (compiling and recording)."""
    count = sized(100 if device == "cuda" else 40, 2)
    updates: dict[str, Callable[[int], float]] = {}
    first: dict[str, float] = {}
    for kind in kinds:
        agent, sample = policy(settings(case, kind), device)

        def update(times: int, agent: Agent = agent, batch: Batch = sample()) -> float:  # noqa: B008
            for _ in range(times):
                q = agent.update(batch, guide=True)["q"]
            return q.item()  # waits until a GPU is done

        updates[kind] = update

    q: dict[str, float] = {}
    for kind, update in updates.items():
        first[kind] = wall(lambda kind=kind, update=update: q.update({kind: update(10)}))
    reference = next(iter(q))
    for kind, value in q.items():
        # bfloat16 has 8 bits, and ten updates let the difference grow: to 6 % with DeepMDP on a CPU, too.
        same = partial(math.isclose, rel_tol=0.15 if "bfloat16" in kind else 3e-2, abs_tol=3e-3)
        check_same({reference: partial(float, q[reference]), kind: partial(float, value)}, same)
    runs = {kind: partial(update, count) for kind, update in updates.items()}
    result = race(runs, repeats, lambda run: wall(run) / count, warmups=0)
    if device == "cuda":
        result["on_device"] = on_device(partial(next(iter(updates.values())), 1), record=False)
    return {**result, "items": 1, "first_ten": first}


def sampled_updates(case: Case, device: str, repeats: int, kinds: Iterable[str]) -> dict[str, Any]:
    """Seconds of sampling a batch and updating on it, as a run does in turn.

    Contestants are named by what the host launches; "one graph" is sampling and update recorded together.
    """
    count = sized(100 if device == "cuda" else 40, 2)

    def steps(kind: str) -> Callable[[], float]:
        agent, sample = policy(settings(case, kind), device)

        def run(times: int = count) -> float:
            for _ in range(times):
                q = agent.update(sample(), guide=True)["q"]
            return q.item()

        run(10)  # compiles and records
        return run

    def one_graph(kind: str) -> Callable[[], float]:
        agent, sampling = drawing_policy(settings(case, kind), device)

        def run(times: int = count) -> float:
            for _ in range(times):
                q = agent.update_from(sampling, guide=True)["q"]
            return q.item()

        run(10)
        return run

    runs = {f"sample, then update ({kind})": steps(kind) for kind in kinds}
    for kind, name in (("graph", "one graph"), ("bfloat16 graph", "one graph, bfloat16")):
        if kind in kinds:
            runs[name] = one_graph(kind)
    result = race(runs, repeats, lambda run: wall(run) / count, warmups=0)
    return {**result, "items": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", help="carracing on a CPU and carracing-gpu on a GPU if not given")
    parser.add_argument(
        "--augment", choices=("crop", "shift", "translate"), default="crop", help="shift keeps 84x84"
    )
    parser.add_argument("--agents", nargs="+", metavar="KIND", help="published ones, instead of the preset's")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="of agents; all if not given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures there, after every row")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, repeats = arguments.device, arguments.repeats
    use_tensor_cores(torch.device(device))  # as a run does
    preset = arguments.preset or ("carracing-gpu" if device == "cuda" else "carracing")
    kinds = [
        kind
        for kind in arguments.kinds or KINDS
        if device == "cuda" or not KINDS[kind]["graph"]  # a CPU has no graphs
    ]
    rows = {}
    for agent in arguments.agents or [None]:
        case = Case(preset, agent, arguments.augment)
        whose = f"{preset}, {agent or case.augment}"
        for name, measure in (("update", compare_updates), ("sample + update", sampled_updates)):
            rows[f"{name}, {whose}"] = measure(case, device, repeats, kinds)
            write_rows(arguments.json, rows)
    print(f"{heading(device)}\n{table(rows)}")
    for name, row in rows.items():
        if "first_ten" in row:
            took = ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in row["first_ten"].items())
            print(f"\nThe first ten of {name} take {took}.")


if __name__ == "__main__":
    main()
