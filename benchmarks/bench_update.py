"""What it gains to launch a policy update as one CUDA graph, to compile it, or both.

    python benchmarks/bench_update.py [--device cuda] [--preset NAME] [--threads N] [> FILE.md]

Every kind of agent makes guided updates on one batch, but the one that also samples. None is timed whose Q
differs from the eager agent's after ten updates, the one that samples excepted. Compiled code stays in a
cache on disk, and in the process for the next agent: for the seconds of a first time, set
TORCHINDUCTOR_CACHE_DIR to an empty folder.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from race import check_same, heading, race, table, wall

from covr_fast import ReplayBuffer, TrainConfig
from covr_fast.agents import SAC
from covr_fast.buffer import Batch
from covr_fast.buffer.sampling import Sampling
from covr_fast.view import agent_obs_shape

KINDS = {
    "eager": {},
    "graph": {"graph": True},
    "compile": {"compile": True},
    "compile + graph": {"compile": True, "graph": True},
}
DRAWN = "sample + update as one graph"
KINDS[DRAWN] = {"graph": True}


def policy(config: TrainConfig, device: str) -> tuple[SAC, Sampling]:
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
    crop = {"augment": "crop", "pad": replay.pad, "memory_format": torch.channels_last}
    return agent, buffer.sampling(replay.batch_size, **crop)


def drawn_updates(agent: SAC, sampling: Sampling, times: int) -> float:
    """As many updates, each on a batch of its own that it draws."""
    for _ in range(times):
        q = agent.update_from(sampling, guide=True)["q"]
    return q.item()


def compare_updates(preset: str, device: str, repeats: int) -> str:
    """Milliseconds per update by kind of agent, and seconds of its first ten (compiling and recording)."""
    count = 100 if device == "cuda" else 40
    updates: dict[str, Callable[[int], float]] = {}
    first: dict[str, float] = {}
    for name, options in KINDS.items():
        if "graph" in options and device != "cuda":
            continue
        config = TrainConfig.preset(preset)
        vars(config.agent).update(options)
        agent, sampling = policy(config, device)

        if name == DRAWN:
            updates[name] = partial(drawn_updates, agent, sampling)
            continue

        def update(times: int, agent: SAC = agent, batch: Batch = sampling.sample()) -> float:  # noqa: B008
            for _ in range(times):
                q = agent.update(batch, guide=True)["q"]
            return q.item()  # waits until a GPU is done

        updates[name] = update

    def first_ten(name: str) -> float:
        result: list[float] = []
        first[name] = wall(lambda: result.append(updates[name](10)))
        return result[0]

    same = partial(math.isclose, rel_tol=1e-2, abs_tol=1e-3)
    check_same({name: partial(first_ten, name) for name in updates if name != DRAWN}, same)
    if DRAWN in updates:
        first_ten(DRAWN)
    runs = {name: partial(update, count) for name, update in updates.items()}
    result = race(runs, repeats, lambda run: wall(run) / count, warmups=0)
    took = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in first.items())
    return f"{table({f'update of {preset}': result})}\n\nThe first ten updates take {took}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", help="carracing on a CPU and carracing-gpu on a GPU if not given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    preset = arguments.preset or ("carracing-gpu" if arguments.device == "cuda" else "carracing")
    print(heading(arguments.device))
    print(compare_updates(preset, arguments.device, arguments.repeats))


if __name__ == "__main__":
    main()
