"""The loop of covr_fast as a contestant: a Trainer that never asks its VLM."""

import contextlib
import os
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from covr_fast import Trainer
from covr_fast.agents import SAC
from covr_fast.callbacks import Callback
from covr_fast.envs import Rows

from .checks import Seen, check_finite, check_updates, operations, parameters
from .chunks import Facts, Pauses, Progress
from .settings import WARMUP, Settings, settings_of


def train(connection: Connection, settings: Settings) -> None:
    """Trains until it is told to stop."""
    config = settings_of(settings)
    batches = config.env.num_envs // config.env.batch_size
    # The first updates allocate what later ones use again.
    ready_at = WARMUP + 8 * max(config.env.num_envs, settings.decisions_per_update)
    pauses, seen = Pauses(connection, ready_at, settle=batches + 1), Seen()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as quiet:
        trainer = Trainer(config, Path(folder) / "run")

        def facts() -> Facts:
            return check(trainer, settings, seen)

        class Pausing(Callback):
            def on_step(self, trainer: Trainer, rows: Rows) -> None:
                counters = trainer.counters
                if counters.decisions <= ready_at + config.env.num_envs:
                    seen.add(rows.obs)
                    seen.add(rows.next_obs)
                pauses(Progress(counters.decisions, counters.updates, dict(trainer.clock.seconds)), facts)

        trainer.callbacks.append(Pausing())
        reset = trainer.envs.reset

        def seen_reset() -> object:
            obs = reset()
            seen.add(obs)
            return obs

        trainer.envs.reset = seen_reset  # type: ignore[method-assign, assignment]
        with contextlib.redirect_stdout(quiet):
            trainer.run()


def check(trainer: Trainer, settings: Settings, seen: Seen) -> Facts:
    """Checks a trainer after its warm-up, and says what it trains."""
    agent, config = trainer.agent, trainer.config
    assert isinstance(agent, SAC)
    seen.check(trainer.buffer.sample(64, dtype=torch.uint8).obs)
    learning = trainer.counters.decisions - WARMUP
    check_updates(trainer.counters.updates, learning, settings.decisions_per_update, config.env.batch_size)
    check_finite(*agent.modules().values())
    batch = trainer.sample()
    return {
        "obs_shape": config.env.obs_shape,
        "batch_size": len(batch.reward),
        "parameters": parameters([agent.encoder, agent.actor, agent.critic]),
        "act operations": operations(lambda: agent.act(torch.zeros(8, *config.env.obs_shape))),
        "critic operations": operations(
            lambda: agent.critic(agent.encoder(batch.obs), batch.action.to(torch.float32))
        ),
        "update operations": operations(lambda: agent.update(batch, guide=False)),
        "threads": torch.get_num_threads(),
    }
