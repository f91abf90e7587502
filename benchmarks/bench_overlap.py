"""How much of the VLM's time is hidden: rounds beside policy updates, priors beside the simulation.

    python benchmarks/bench_overlap.py [--repeats 5] [--model MODEL] [--json FILE] [> FILE.md]
    python benchmarks/bench_overlap.py --timeline FILE.png     # a picture of a short round, and nothing else

Policy updates and rounds are those of the `carracing` preset with one torch thread each, so a machine needs
two free cores to show anything; with another model than nano, such as `qwen-3b-random`, those of
`carracing-gpu`. For the simulation the whole loop of `carracing` runs with nano: without priors, with
priors asked in the step, and with priors asked in the background.
"""

import argparse
import contextlib
import os
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timeline
import torch
from bench_update import policy
from race import heading, race, sized, table, wall, write_rows
from random_qwen import open_prior

from covr_fast import TrainConfig, Trainer
from covr_fast.machine import device_name
from covr_fast.streams import Lane
from covr_fast.vlm import TunerConfig, VLMTuner


def policy_updates(config: TrainConfig, device: str) -> Callable[[int], None]:
    """n -> n updates of the preset's agent, each from a new batch, in a lane as the trainer has it."""
    agent, sample = policy(config, device)
    lane = Lane(torch.device(device), urgent=True)

    def update(count: int) -> None:
        with lane.work():
            for _ in range(count):
                agent.update(sample(), guide=True)
        lane.synchronize()

    return update


def tuner_round(
    config: TrainConfig, model: str, device: str, samples: int, epochs: int
) -> Callable[[], None]:
    """A round of the preset's tuner on noise, overlapped: in its own thread and, on a GPU, stream."""
    prior = open_prior(model, action_dim=2, decimals=config.vlm.decimals, device=device)
    tuner = VLMTuner(prior, TunerConfig(**(vars(config.tuner) | {"overlap": True, "epochs": epochs})))
    frames = torch.randint(0, 256, (samples, 3, *config.env.obs_shape[1:]), dtype=torch.uint8)
    actions, returns = torch.rand(samples, 2) * 2 - 1, torch.ones(samples)

    def tune() -> None:
        tuner.start(frames, actions, returns)
        tuner.wait()

    return tune


def settings(model: str) -> TrainConfig:
    return TrainConfig.preset("carracing" if model == "nano" else "carracing-gpu")


def overlap(repeats: int, model: str, device: str, samples: int, epochs: int) -> dict[str, Any]:
    """The same work alone, serial and overlapped."""
    config = settings(model)
    update, tune = policy_updates(config, device), tuner_round(config, model, device, samples, epochs)
    update(3)
    tune()
    alone = wall(tune)
    some = sized(20, 1)
    count = max(1, round(alone / (wall(lambda: update(some)) / some)))  # as long as the round

    def both() -> None:
        thread = threading.Thread(target=update, args=(count,))
        thread.start()
        tune()
        thread.join()

    def serial() -> None:
        update(count)
        tune()

    runs = {"policy": partial(update, count), "tuner": tune, "serial": serial, "overlapped": both}
    return {**race(runs, repeats, warmups=0), "updates": count}


def share_of_the_longer(row: dict[str, Any]) -> float:
    """The time of both overlapped over that of the longer of the two alone."""
    seconds = row["seconds"]
    return seconds["overlapped"] / max(seconds["policy"], seconds["tuner"])


def simulation(repeats: int, device: str, decisions: int) -> dict[str, Any]:
    """The loop's time with each kind of priors; the items per second are decisions."""

    def loop_seconds(vlm: dict[str, object]) -> float:
        config = TrainConfig.preset("carracing")
        config.device, config.video = device, False
        config.steps = decisions * config.env.action_repeat
        config.warmup = sized(256, 96) * config.env.action_repeat  # updates nearly from the start
        config.replay.batch_size = sized(config.replay.batch_size, 8)
        config.covr.psi_0 = 10 * config.steps  # no rounds
        config.eval.episodes, config.eval.vlm, config.env.max_episode_steps = 1, False, 40
        vars(config.vlm).update(vlm)
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(config, Path(folder) / "run")
            train, seconds = trainer._train, []
            trainer._train = lambda interrupted: seconds.append(wall(lambda: train(interrupted)))
            with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
                trainer.run()
        return seconds[0]

    priors = {"off": {"every": 10**9}, "in the step": {}, "background": {"background": True}}
    runs = {name: partial(loop_seconds, vlm) for name, vlm in priors.items()}
    result = race(runs, repeats, lambda run: run(), warmups=0)
    return {**result, "items": decisions}


def draw_timeline(model: str, device: str, out: Path) -> None:
    """A picture of a round of 64 samples beside policy updates."""
    config = settings(model)
    update, tune = policy_updates(config, device), tuner_round(config, model, device, samples=64, epochs=3)
    update(3)
    tune()
    found = timeline.record({"policy updates": lambda: update(32), "caller of the tuner": tune}, device)
    title = f"a round of fine-tuning beside policy updates, {device_name(device)}"
    timeline.draw(found, title, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--decisions", type=int, default=1500, help="of a run of the simulation")
    parser.add_argument(
        "--model", default="nano", help="tuned: nano, qwen-3b-random, a directory or a hub id"
    )
    parser.add_argument("--samples", type=int, default=256, help="of a round")
    parser.add_argument("--epochs", type=int, default=6, help="of a round")
    parser.add_argument("--timeline", type=Path, help="draw a short round beside updates, and end there")
    parser.add_argument("--json", type=Path, help="also write the figures there, after every row")
    arguments = parser.parse_args()
    model, device, repeats = arguments.model, arguments.device, arguments.repeats
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.timeline:
        draw_timeline(model, device, arguments.timeline)
        return
    beside = overlap(repeats, model, device, arguments.samples, arguments.epochs)
    rows = {f"a round of {model} beside {beside['updates']} updates": beside}
    write_rows(arguments.json, rows)
    rows["the loop with priors"] = simulation(repeats, device, arguments.decisions)
    write_rows(arguments.json, rows)
    print(f"{heading(device)}\n{table(rows)}")
    print(f"\nOverlapped takes {share_of_the_longer(beside):.2f}x the longer of the two alone.")


if __name__ == "__main__":
    main()
