"""How well the VLM hides behind the agent: rounds beside policy updates, priors beside the simulation; and
on a GPU, what it gains to launch a policy update as one graph.

    python benchmarks/bench_overlap.py [--json FILE] [--timeline FILE.png] [--repeats 5]

Policy updates and rounds are those of the `carracing` preset with one torch thread each, so a machine needs
two free cores to show anything. Every repetition times policy alone, tuner alone, one after the other, and
both at once. For the simulation the whole loop runs without priors, with priors asked in the step, and with
priors asked in the background, in turn. Medians are compared.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timeline
import torch

from covr_fast import ReplayBuffer, TrainConfig, Trainer
from covr_fast.agents import SAC
from covr_fast.buffer import Batch
from covr_fast.streams import Lane
from covr_fast.view import agent_obs_shape
from covr_fast.vlm import ActionPrior, TunerConfig, VLMTuner


def medians(candidates: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The median of what each candidate returns, asked in turn."""
    values: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            values[name].append(run())
    return {name: statistics.median(v) for name, v in values.items()}


def finish(device: str) -> None:
    """Waits for what a GPU was told to do."""
    if device == "cuda":
        torch.cuda.synchronize()


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


def policy_updates(config: TrainConfig, device: str) -> Callable[[int], None]:
    """n -> n updates of the preset's agent, each from a new batch, in a lane such as the trainer's."""
    agent, sample = policy(config, device)
    lane = Lane(torch.device(device), urgent=True)

    def update(count: int) -> None:
        with lane.work():
            for _ in range(count):
                agent.update(sample(), guide=True)
        lane.synchronize()

    return update


def launches(repeats: int, device: str, count: int = 100) -> dict[str, float]:
    """Milliseconds per update of the `carracing-gpu` agent on one batch, kernel by kernel and as a graph."""

    def updates(graph: bool) -> tuple[Callable[[], float], float]:
        config = TrainConfig.preset("carracing-gpu")
        config.agent.graph = graph
        agent, sample = policy(config, device)
        batch = sample()

        def run() -> None:
            for _ in range(count):
                agent.update(batch, guide=True)
            finish(device)

        for _ in range(10):  # warms up and records
            q = agent.update(batch, guide=True)["q"].item()
        return lambda: 1e3 * timed(run) / count, q

    (eager, expected), (graph, got) = updates(False), updates(True)
    if not math.isclose(expected, got, rel_tol=1e-2, abs_tol=1e-3):
        raise SystemExit(
            f"mean Q after 10 updates is {got} by the graph, {expected} without: nothing to time"
        )
    result = medians({"eager": eager, "graph": graph}, repeats)
    result["speedup"] = result["eager"] / result["graph"]
    return result


def tuner_round(config: TrainConfig, device: str, samples: int = 256, epochs: int = 6) -> Callable[[], None]:
    """A round of the preset's tuner on noise, overlapped: its own thread and, on a GPU, stream."""
    prior = ActionPrior.from_pretrained("nano", action_dim=2, decimals=config.vlm.decimals, device=device)
    tuner = VLMTuner(prior, TunerConfig(**(vars(config.tuner) | {"overlap": True, "epochs": epochs})))
    frames = torch.randint(0, 256, (samples, 3, *config.env.obs_shape[1:]), dtype=torch.uint8)
    actions, returns = torch.rand(samples, 2) * 2 - 1, torch.ones(samples)

    def tune() -> None:
        tuner.start(frames, actions, returns)
        tuner.wait()

    return tune


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def overlap(repeats: int, device: str) -> dict[str, float]:
    """Seconds of the same work alone, serial and overlapped, and the ratio to the longer of the two."""
    config = TrainConfig.preset("carracing")
    update, tune = policy_updates(config, device), tuner_round(config, device)
    update(3)
    tune()
    alone = timed(tune)
    count = max(1, round(alone / (timed(lambda: update(20)) / 20)))  # as long as the round

    def both() -> None:
        thread = threading.Thread(target=update, args=(count,))
        thread.start()
        tune()
        thread.join()

    def serial() -> None:
        update(count)
        tune()

    result = medians(
        {
            "policy": lambda: timed(lambda: update(count)),
            "tuner": lambda: timed(tune),
            "serial": lambda: timed(serial),
            "overlapped": lambda: timed(both),
        },
        repeats,
    )
    result["updates"] = count
    result["ratio"] = result["overlapped"] / max(result["policy"], result["tuner"])
    return result


def draw_timeline(device: str, out: Path) -> None:
    """A picture of a round of 64 samples beside policy updates."""
    config = TrainConfig.preset("carracing")
    update, tune = policy_updates(config, device), tuner_round(config, device, samples=64, epochs=3)
    update(3)
    tune()
    found = timeline.record({"policy updates": lambda: update(32), "caller of the tuner": tune}, device)
    title = f"a round of fine-tuning beside policy updates, {device_name(device)}"
    timeline.draw(found, title, out)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"


def simulation(repeats: int, device: str, steps: int) -> dict[str, float]:
    """Environment steps per second of the loop, and their share of the speed without priors."""

    def run(**vlm: object) -> float:
        config = TrainConfig.preset("carracing")
        config.device, config.steps, config.video = device, steps, False
        config.warmup = 256  # updates nearly from the start
        config.covr.psi_0 = 10 * steps  # no rounds
        config.eval.episodes, config.eval.vlm, config.env.max_episode_steps = 1, False, 40
        for name, value in vlm.items():
            setattr(config.vlm, name, value)
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(config, Path(folder) / "run")
            train, seconds = trainer._train, []
            trainer._train = lambda interrupted: seconds.append(timed(lambda: train(interrupted)))
            with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
                trainer.run()
        return steps / seconds[0]

    result = medians(
        {
            "off": lambda: run(every=10**9),
            "in the step": lambda: run(),
            "background": lambda: run(background=True),
        },
        repeats,
    )
    for name in ("in the step", "background"):
        result[f"{name}, share"] = result[name] / result["off"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1500, help="of a run of the simulation")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--timeline", type=Path, help="draw a short round beside updates, and end there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.timeline:
        draw_timeline(arguments.device, arguments.timeline)
        return
    facts: dict[str, object] = {}
    if arguments.device == "cuda":
        facts["update"] = update = launches(arguments.repeats, arguments.device)
        print(
            f"an update takes {update['eager']:.2f} ms kernel by kernel, {update['graph']:.2f} ms as a graph "
            f"({update['speedup']:.1f}x)"
        )
    beside = overlap(arguments.repeats, arguments.device)
    print("  ".join(f"{name} {beside[name]:.2f} s" for name in ("policy", "tuner", "serial", "overlapped")))
    print(f"overlapped takes {beside['ratio']:.2f}x the longer of the two alone")
    loop = simulation(arguments.repeats, arguments.device, arguments.steps)
    print(
        "steps/s:  " + "  ".join(f"{name} {loop[name]:.1f}" for name in ("off", "in the step", "background"))
    )
    print(
        f"with priors in the step {loop['in the step, share']:.0%} of the speed without, in the background "
        f"{loop['background, share']:.0%}"
    )
    if arguments.json:
        facts |= {
            "device": device_name(arguments.device),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
        arguments.json.write_text(
            json.dumps({**facts, "overlap": beside, "simulation": loop}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
