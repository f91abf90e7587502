"""How much of the VLM's time is hidden: rounds beside policy updates, priors beside the simulation; and on a
GPU first what bench_update.py measures.

    python benchmarks/bench_overlap.py [--repeats 5] [> FILE.md]
    python benchmarks/bench_overlap.py --timeline FILE.png     # a picture of a short round, and nothing else

Policy updates and rounds are those of the `carracing` preset with one torch thread each, so a machine needs
two free cores to show anything. For the simulation the whole loop runs without priors, with priors asked in
the step, and with priors asked in the background.
"""

import argparse
import contextlib
import os
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timeline
import torch
from bench_update import compare_updates, policy
from race import device_name, heading, race, table, wall

from covr_fast import TrainConfig, Trainer
from covr_fast.streams import Lane
from covr_fast.vlm import ActionPrior, TunerConfig, VLMTuner


def policy_updates(config: TrainConfig, device: str) -> Callable[[int], None]:
    """n -> n updates of the preset's agent, each from a new batch, in a lane as the trainer has it."""
    agent, sampling = policy(config, device)
    sample = sampling.sample
    lane = Lane(torch.device(device), urgent=True)

    def update(count: int) -> None:
        with lane.work():
            for _ in range(count):
                agent.update(sample(), guide=True)
        lane.synchronize()

    return update


def tuner_round(config: TrainConfig, device: str, samples: int = 256, epochs: int = 6) -> Callable[[], None]:
    """A round of the preset's tuner on noise, overlapped: in its own thread and, on a GPU, stream."""
    prior = ActionPrior.from_pretrained("nano", action_dim=2, decimals=config.vlm.decimals, device=device)
    tuner = VLMTuner(prior, TunerConfig(**(vars(config.tuner) | {"overlap": True, "epochs": epochs})))
    frames = torch.randint(0, 256, (samples, 3, *config.env.obs_shape[1:]), dtype=torch.uint8)
    actions, returns = torch.rand(samples, 2) * 2 - 1, torch.ones(samples)

    def tune() -> None:
        tuner.start(frames, actions, returns)
        tuner.wait()

    return tune


def overlap(repeats: int, device: str) -> str:
    """The same work alone, serial and overlapped, and the ratio of the last to the longer of the two."""
    config = TrainConfig.preset("carracing")
    update, tune = policy_updates(config, device), tuner_round(config, device)
    update(3)
    tune()
    alone = wall(tune)
    count = max(1, round(alone / (wall(lambda: update(20)) / 20)))  # as long as the round

    def both() -> None:
        thread = threading.Thread(target=update, args=(count,))
        thread.start()
        tune()
        thread.join()

    def serial() -> None:
        update(count)
        tune()

    runs = {"policy": partial(update, count), "tuner": tune, "serial": serial, "overlapped": both}
    result = race(runs, repeats, warmups=0)
    seconds = result["seconds"]
    ratio = seconds["overlapped"] / max(seconds["policy"], seconds["tuner"])
    rows = table({f"a round beside {count} updates": result})
    return f"{rows}\n\nOverlapped takes {ratio:.2f}x the longer of the two alone."


def simulation(repeats: int, device: str, steps: int) -> str:
    """The loop's time with each kind of priors; the items per second are environment steps."""

    def loop_seconds(vlm: dict[str, object]) -> float:
        config = TrainConfig.preset("carracing")
        config.device, config.steps, config.video = device, steps, False
        config.warmup = 256  # updates nearly from the start
        config.covr.psi_0 = 10 * steps  # no rounds
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
    return table({"the loop with priors": {**result, "items": steps}})


def draw_timeline(device: str, out: Path) -> None:
    """A picture of a round of 64 samples beside policy updates."""
    config = TrainConfig.preset("carracing")
    update, tune = policy_updates(config, device), tuner_round(config, device, samples=64, epochs=3)
    update(3)
    tune()
    found = timeline.record({"policy updates": lambda: update(32), "caller of the tuner": tune}, device)
    title = f"a round of fine-tuning beside policy updates, {device_name(device)}"
    timeline.draw(found, title, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1500, help="of a run of the simulation")
    parser.add_argument("--timeline", type=Path, help="draw a short round beside updates, and end there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.timeline:
        draw_timeline(arguments.device, arguments.timeline)
        return
    print(heading(arguments.device))
    if arguments.device == "cuda":
        print(compare_updates("carracing-gpu", arguments.device, arguments.repeats), end="\n\n")
    print(overlap(arguments.repeats, arguments.device), end="\n\n")
    print(simulation(arguments.repeats, arguments.device, arguments.steps))


if __name__ == "__main__":
    main()
