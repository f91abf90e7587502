"""Stable-Baselines3's SAC as a contestant, with the network of ours."""

import time
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor

from covr_fast.agents import SAC as OurSAC
from covr_fast.agents import AgentConfig

from .checks import Seen, check_finite, check_updates, operations, parameters
from .chunks import Facts, Pauses, Progress
from .peer_envs import MAKERS
from .settings import WARMUP, Settings, settings_of
from .vector import GymnasiumVecEnv, vector_env


class OurEncoder(BaseFeaturesExtractor):
    """The encoder of covr_fast, channels last like there."""

    def __init__(self, observation_space: spaces.Box, agent: AgentConfig):
        super().__init__(observation_space, agent.latent)
        self.encoder = OurSAC(observation_space.shape, (1,), agent).encoder

    def forward(self, pixels: Tensor) -> Tensor:
        latent: Tensor = self.encoder(pixels)
        return latent


def make_model(settings: Settings, how: str) -> SAC:
    """The network, batch, rates and ratio of ours. Actor and critic share one encoder, which is Stable-
    Baselines3's fastest way; `how`: see vector_env."""
    config = settings_of(settings)
    agent, n = config.agent, config.env.num_envs
    makers = [partial(MAKERS[settings.environment], config.env)] * n
    if n % settings.decisions_per_update and settings.decisions_per_update % n:
        raise ValueError(
            f"decisions_per_update={settings.decisions_per_update} neither divides nor is divided by the {n} "
            "environments, which Stable-Baselines3 steps together: choose another"
        )
    frequency = max(1, settings.decisions_per_update // n)
    return SAC(
        "CnnPolicy",
        GymnasiumVecEnv(vector_env(makers, how)),
        learning_rate=agent.lr,
        buffer_size=config.replay.capacity,
        learning_starts=WARMUP,
        batch_size=config.replay.batch_size,
        tau=agent.tau,
        gamma=config.replay.gamma,
        train_freq=(frequency, "step"),
        gradient_steps=n * frequency // settings.decisions_per_update,
        ent_coef=f"auto_{agent.init_alpha}",
        policy_kwargs={
            "features_extractor_class": OurEncoder,
            "features_extractor_kwargs": {"agent": agent},
            "net_arch": [agent.hidden, agent.hidden],
            "share_features_extractor": True,
        },
        seed=0,
        device="cpu",
    )  # fmt: skip


def train(connection: Connection, settings: Settings, how: str) -> None:
    """Trains until it is told to stop."""
    model = make_model(settings, how)  # forks the environments before torch has threads
    torch.set_num_threads(settings.threads)
    try:
        model.learn(10**9, callback=Watch(connection, settings, model))
    finally:
        assert model.env is not None
        model.env.close()


class Watch(BaseCallback):
    """Pauses a model, and takes its time by activity."""

    def __init__(self, connection: Connection, settings: Settings, model: SAC):
        super().__init__()
        env = settings_of(settings).env
        self._settings, self._seen = settings, Seen()
        self._rollout = max(env.num_envs, settings.decisions_per_update)
        self._ready_at = WARMUP + 8 * self._rollout
        self._pauses = Pauses(connection, self._ready_at, settle=1)
        self._seconds = {"simulation": 0.0, "policy update": 0.0}
        assert model.env is not None
        model.train = self._timed("policy update", model.train)  # type: ignore[method-assign]
        model.env.step_wait = self._timed("simulation", model.env.step_wait)  # type: ignore[method-assign]

    def _timed(self, activity: str, function: Any) -> Any:
        def timed(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self._seconds[activity] += time.perf_counter() - begin

        return timed

    def _on_step(self) -> bool:
        model = self.model
        assert isinstance(model, SAC)
        if self.num_timesteps <= self._ready_at + 2 * self._rollout:
            assert isinstance(model._last_obs, np.ndarray)
            self._seen.add(model._last_obs)
            self._seen.add(self.locals["new_obs"])
        self._pauses(Progress(self.num_timesteps, model._n_updates, dict(self._seconds)), self._check)
        return True

    def _check(self) -> Facts:
        """Checks the model after its warm-up, and says what it trains."""
        model, settings = self.model, self._settings
        assert isinstance(model, SAC)
        assert model.replay_buffer is not None
        batch = model.replay_buffer.sample(model.batch_size)
        self._seen.check(batch.observations[:64].to(torch.uint8))
        learning = self.num_timesteps - WARMUP
        check_updates(model._n_updates, learning, settings.decisions_per_update, 2 * self._rollout)
        check_finite(model.policy)
        obs = batch.observations
        facts: Facts = {
            "obs_shape": tuple(obs.shape[1:]),
            "batch_size": len(obs),
            "parameters": parameters([model.actor, model.critic]),
            "act operations": operations(lambda: model.actor(obs[:1].repeat(8, 1, 1, 1))),
            "critic operations": operations(lambda: model.critic(obs, batch.actions)),
            "threads": torch.get_num_threads(),
        }
        before, train = model._n_updates, type(model).train
        facts["update operations"] = operations(lambda: train(model, 1, model.batch_size))
        model._n_updates = before
        return facts
