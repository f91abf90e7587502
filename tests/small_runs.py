"""Small runs: real CarRacing frames and the real nano VLM, in this process or through the command line."""

import os
import signal
import sys
from dataclasses import replace

import pytest

from covr_fast import TrainConfig, Trainer, cli
from covr_fast.callbacks import Callback

TINY = {
    "steps": 64, "warmup": 32, "log-every": 16, "decisions-per-update": 8, "threads": 1, "env.num-envs": 2,
    "env.batch-size": 2, "env.action-repeat": 1, "env.max-episode-steps": 6,
    "env.height": 48, "env.width": 48,
    "replay.batch-size": 16, "replay.capacity": 200, "covr.psi-0": 30, "covr.min-samples": 4,
    "eval.episodes": 2, "vlm.every": 3, "tuner.max-steps": 4,
}  # fmt: skip
FLAGS = [f"--{name}={value}" for name, value in TINY.items()]
COVR = [sys.executable, "-m", "covr_fast.cli"]
TRAIN = [*COVR, "train", "carracing", *FLAGS]


def call(monkeypatch, *arguments: str) -> int:
    """The exit code of a command."""
    monkeypatch.setattr(sys, "argv", ["covr-fast", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def small_config(**changes) -> TrainConfig:
    config = TrainConfig.preset("carracing")
    config.steps, config.warmup, config.decisions_per_update, config.log_every = 160, 32, 8, 40
    config.video, config.threads, config.device = False, 1, "cpu"
    config.env.num_envs, config.env.batch_size = 4, 2
    config.env.action_repeat, config.env.max_episode_steps = 1, 10
    config.env.height = config.env.width = 48
    config.agent.channels, config.agent.strides, config.agent.hidden = (8, 8), (4, 2), 32
    config.replay.batch_size, config.replay.capacity = 16, 400
    config.covr.psi_0, config.covr.min_samples, config.covr.cold_start = 50, 8, 1
    config.covr.horizon = None
    config.tuner = replace(config.tuner, epochs=2, max_steps=4)
    config.vlm.every = 5
    config.eval.episodes, config.eval.vlm = 2, False
    for name, value in changes.items():
        part, _, leaf = name.rpartition("__")
        setattr(getattr(config, part) if part else config, leaf, value)
    return config


def roundless(**changes) -> TrainConfig:
    """The same without a fine-tuning round."""
    return small_config(**({"covr__psi_0": 1000} | changes))


class EachStep(Callback):
    """Calls a function of the rows."""

    def __init__(self, call) -> None:
        self.call = call

    def on_step(self, _trainer, rows) -> None:
        self.call(rows)


def at_each_step(trainer: Trainer, call) -> None:
    """Calls `call(rows)` at the end of every turn of the loop."""
    trainer.callbacks.append(EachStep(call))


def interrupt_at(trainer: Trainer, step: int) -> None:
    """Lets the run receive Ctrl-C when it has made `step` steps."""
    at_each_step(trainer, lambda _rows: os.kill(os.getpid(), signal.SIGINT) if trainer.step == step else None)


def run_until(trainer: Trainer, step: int) -> None:
    """Runs, and interrupts the run after `step` steps."""
    interrupt_at(trainer, step)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()


def killed(*_) -> None:
    """Ends the run with as little tidied up as if the process had died."""
    raise SystemExit


def run_until_killed(trainer: Trainer, step: int) -> None:
    at_each_step(trainer, lambda _rows: killed() if trainer.step >= step else None)
    with pytest.raises(SystemExit):
        trainer.run()
