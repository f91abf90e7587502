"""How well the VLM hides behind the agent: rounds beside policy updates, priors beside the simulation; and
on a GPU first what bench_update.py measures.

    python benchmarks/bench_overlap.py [--json FILE] [--timeline FILE.png] [--repeats 5]

Policy updates and rounds are those of the `carracing` preset with one torch thread each, so a machine needs
two free cores to show anything. Every repetition times policy alone, tuner alone, one after the other, and
both at once. For the simulation the whole loop runs without priors, with priors asked in the step, and with
priors asked in the background, in turn. Medians are compared.
"""

import argparse
import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import timeline
import torch
from bench_update import device_name, facts, line, medians, policy, timed, updates

from covr_fast import TrainConfig, Trainer
from covr_fast.streams import Lane
from covr_fast.vlm import ActionPrior, TunerConfig, VLMTuner


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
    figures: dict[str, object] = {}
    if arguments.device == "cuda":
        figures["update"] = update = updates("carracing-gpu", arguments.device, arguments.repeats)
        print(line(update))
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
        figures |= {**facts(arguments.device), "overlap": beside, "simulation": loop}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
