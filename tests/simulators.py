"""Simulators with EnvPool's semantics (the step after an episode's end is the reset) and known contents."""

from typing import Any

import numpy as np

from covr_fast.env_config import EnvConfig
from covr_fast.envs import PixelEnvs, Task
from covr_fast.words import Words

SIZE = 12


def known_task() -> Task:
    """Of simulators that are given to PixelEnvs: one number, frames as observations."""

    def simulate(seed: int) -> None:
        raise AssertionError("the simulators are given")

    return Task(1, lambda a: a, lambda o: o, Words("", ("number",)), simulate)


class CountingSimulator:
    """Every frame spells out its environment, episode and step in its pixels.

    Pixel [0, 0] of the three channels is (environment, episode, step). The reward of a step is its number.
    Episodes last `lengths[episode % len(lengths)]` steps; even ones are truncated, odd ones terminate.
    """

    def __init__(self, first: int, num_envs: int, lengths: tuple[int, ...]):
        self.first, self.lengths = first, lengths
        self.episode = np.full(num_envs, -1)
        self.step_in_episode = np.zeros(num_envs, int)
        self.over = np.ones(num_envs, bool)
        self.ignored_actions = 0

    def _frames(self, ids: np.ndarray) -> np.ndarray:
        frames = np.zeros((len(ids), SIZE, SIZE, 3), np.uint8)
        labels = np.stack([ids + self.first, self.episode[ids], self.step_in_episode[ids]], axis=1)
        frames[:] = labels[:, None, None]
        return frames

    def _begin(self, env: int) -> None:
        self.episode[env] += 1
        self.step_in_episode[env] = 0
        self.over[env] = False

    def reset(self) -> tuple[np.ndarray, dict[str, Any]]:
        for env in range(len(self.episode)):
            self._begin(env)
        return self._frames(np.arange(len(self.episode))), {}

    def step(
        self, action: np.ndarray, env_id: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        n = len(env_id)
        reward = np.zeros(n, np.float32)
        terminated, truncated = np.zeros(n, bool), np.zeros(n, bool)
        for row, env in enumerate(env_id):
            if self.over[env]:
                self._begin(env)
                self.ignored_actions += 1
                continue
            self.step_in_episode[env] += 1
            reward[row] = self.step_in_episode[env]
            if self.step_in_episode[env] == self.lengths[self.episode[env] % len(self.lengths)]:
                self.over[env] = True
                even = self.episode[env] % 2 == 0
                truncated[row], terminated[row] = even, not even
        return self._frames(env_id), reward, terminated, truncated, {}

    def close(self) -> None:
        """Nothing to free."""


class TargetSimulator:
    """A task that can only be solved by looking: the action has to point at a bright column.

    Reward 1 - |action - position|, with the position uniform in [-1, 1] and drawn anew at each step.
    """

    def __init__(self, first: int, num_envs: int, length: int = 8):
        self.rng = np.random.default_rng(first)
        self.position = np.zeros(num_envs)
        self.step_in_episode = np.zeros(num_envs, int)
        self.length = length

    def _frames(self, ids: np.ndarray) -> np.ndarray:
        frames = np.zeros((len(ids), SIZE, SIZE, 3), np.uint8)
        self.position[ids] = self.rng.uniform(-1, 1, len(ids))
        column = ((self.position[ids] + 1) / 2 * (SIZE - 1)).round().astype(int)
        frames[np.arange(len(ids)), :, column] = 255
        return frames

    def reset(self) -> tuple[np.ndarray, dict[str, Any]]:
        self.step_in_episode[:] = 0
        return self._frames(np.arange(len(self.position))), {}

    def step(
        self, action: np.ndarray, env_id: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        is_reset = self.step_in_episode[env_id] == self.length
        reward = np.where(is_reset, 0, 1 - np.abs(action[:, 0] - self.position[env_id])).astype(np.float32)
        self.step_in_episode[env_id] = np.where(is_reset, 0, self.step_in_episode[env_id] + 1)
        truncated = self.step_in_episode[env_id] == self.length
        return self._frames(env_id), reward, np.zeros(len(env_id), bool), truncated, {}

    def close(self) -> None:
        """Nothing to free."""


def counting_envs(
    num_envs: int = 4,
    batch_size: int = 2,
    *,
    lengths: tuple[int, ...] = (3, 5),
    frame_stack: int = 2,
    action_repeat: int = 1,
) -> tuple[PixelEnvs, list[CountingSimulator]]:
    config = EnvConfig(
        num_envs=num_envs, batch_size=batch_size, height=SIZE, width=SIZE, frame_stack=frame_stack,
        action_repeat=action_repeat,
    )  # fmt: skip
    simulators = [CountingSimulator(first, batch_size, lengths) for first in range(0, num_envs, batch_size)]
    return PixelEnvs(config, list(simulators), known_task()), simulators


def target_envs(num_envs: int = 8) -> PixelEnvs:
    config = EnvConfig(
        num_envs=num_envs, batch_size=num_envs, height=SIZE, width=SIZE, frame_stack=1, action_repeat=1
    )
    return PixelEnvs(config, [TargetSimulator(0, num_envs)], known_task())
