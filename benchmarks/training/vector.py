"""Gymnasium's vector environments as Stable-Baselines3 wants them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from stable_baselines3.common.vec_env import VecEnv

# A contestant's process is spawned, and would spawn the environments' too, each with all its imports.
VECTORS: dict[str, Callable[..., gym.vector.VectorEnv[Any, Any, Any]]] = {
    "async": partial(AsyncVectorEnv, context="fork"),
    "sync": SyncVectorEnv,
}
"""Environments in a process each, or all in this one."""


def vector_env(
    makers: Sequence[Callable[[], gym.Env[Any, Any]]], how: str
) -> gym.vector.VectorEnv[Any, Any, Any]:
    """Environments that reset in the step in which an episode ends; `how`: see VECTORS."""
    return VECTORS[how](makers, autoreset_mode=AutoresetMode.SAME_STEP)


class GymnasiumVecEnv(VecEnv):
    """A gymnasium.vector environment that resets in the step in which an episode ends."""

    def __init__(self, envs: gym.vector.VectorEnv[Any, Any, Any]):
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)
        self._envs = envs

    def reset(self) -> np.ndarray:
        obs, _ = self._envs.reset(seed=0)
        return np.asarray(obs)

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        obs, reward, terminated, truncated, info = self._envs.step(self._actions)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        done = terminated | truncated
        for i in np.flatnonzero(done):
            infos[i]["terminal_observation"] = info["final_obs"][i]
            infos[i]["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
        return obs, reward.astype(np.float32), done, infos

    def close(self) -> None:
        self._envs.close()

    # Stable-Baselines3 asks for these, but SAC on environments without wrappers uses none of them.

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [None] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs
