"""Evaluation: whole episodes of one policy, in many environments at the same time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from .agents import SAC
from .config import TrainConfig
from .envs import EnvConfig, make_env
from .view import agent_view, vlm_view
from .vlm import ActionPrior

Policy = Callable[[np.ndarray], np.ndarray]
"""uint8[n, C, H, W] -> actions float32[n, A] in [-1, 1]."""

Watcher = Callable[[np.ndarray, np.ndarray, float], None]
"""Called at each decision of the first environment, with obs uint8[C, H, W], action [A] and return so far."""


class Evaluation(NamedTuple):
    """Undiscounted episode returns, float64[episodes]."""

    returns: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.returns.mean())

    @property
    def std(self) -> float:
        return float(self.returns.std())


def evaluate(
    policy: Policy, config: EnvConfig, episodes: int, *, seed: int, watch: Watcher | None = None
) -> Evaluation:
    """Runs `episodes` episodes, each in its own environment, with the seeds seed, seed + 1, ...

    Only the first episode of each environment counts, because short episodes would otherwise count more
    often.
    """
    with make_env(replace(config, num_envs=episodes, batch_size=episodes, num_threads=2, seed=seed)) as envs:
        obs = envs.reset()
        (ids,) = envs.batches()
        returns = np.zeros(episodes)
        running = np.ones(episodes, bool)
        while running.any():
            action = policy(obs)
            if watch and running[0]:
                watch(obs[0], action[0], float(returns[0]))
            envs.send(action, ids)
            rows = envs.recv()
            returns += rows.reward * running
            running &= ~(rows.terminated | rows.truncated)
            obs = rows.obs
    return Evaluation(returns)


def random_policy(action_dim: int, seed: int) -> Policy:
    """Actions uniform in [-1, 1]."""
    rng = np.random.default_rng(seed)
    return lambda obs: rng.uniform(-1, 1, (len(obs), action_dim)).astype(np.float32)


def actor_policy(agent: SAC, config: TrainConfig) -> Policy:
    """The actor without the VLM, as it is deployed: mean actions."""
    return lambda obs: agent.act(agent_view(config, torch.from_numpy(obs)), explore=False).cpu().numpy()


def vlm_policy(prior: ActionPrior, config: TrainConfig) -> Policy:
    """The VLM without the actor: it answers at every decision."""
    return lambda obs: prior(vlm_view(config, torch.from_numpy(obs))).action.cpu().numpy()
