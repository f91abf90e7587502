"""A road in numpy under EnvPool's name and interface, for machines that EnvPool cannot be carried to.

CarRacing-v3's shapes and rules, as far as covr_fast uses them, with another game: steer along a road that
bends. The GPU check puts this folder on the path where EnvPool is missing.
"""

import numpy as np

SIZE = 96


def list_all_envs() -> list[str]:
    return ["CarRacing-v3"]


def make_gymnasium(
    task_id: str, *, num_envs: int, num_threads: int, seed: int, max_episode_steps: int
) -> "Road":
    """`num_threads` is part of the interface; numpy takes none of them."""
    return Road(num_envs, seed, max_episode_steps)


class Road:
    """Actions float32[n, 3]: steering in [-1, 1], gas and brake in [0, 1]. The step after an end resets."""

    def __init__(self, num_envs: int, seed: int, max_episode_steps: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._limit = max_episode_steps
        self._car, self._bend = (
            np.zeros(num_envs),
            np.zeros(num_envs),
        )  # from the middle of the road; its curve
        self._steps = np.zeros(num_envs, int)
        self._over = np.zeros(num_envs, bool)

    def reset(self) -> tuple[np.ndarray, dict]:
        everyone = np.arange(len(self._car))
        self._begin(everyone)
        return self._frames(everyone), {}

    def step(
        self, action: np.ndarray, env_id: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        ended = self._over[env_id]
        self._begin(env_id[ended])
        moving, steering, speed = env_id[~ended], action[~ended, 0], 1 + action[~ended, 1] - action[~ended, 2]
        self._bend[moving] = 0.95 * self._bend[moving] + 0.1 * self._rng.normal(size=len(moving))
        self._car[moving] += 0.1 * speed * (steering - self._bend[moving])
        self._steps[moving] += 1
        reward = np.where(ended, 0, 1 - np.abs(self._car[env_id])).astype(np.float32)
        terminated = ~ended & (np.abs(self._car[env_id]) > 2)
        truncated = ~ended & (self._steps[env_id] >= self._limit)
        self._over[env_id] = terminated | truncated
        return self._frames(env_id), reward, terminated, truncated, {}

    def close(self) -> None:
        """It holds nothing."""

    def _begin(self, env_id: np.ndarray) -> None:
        self._car[env_id] = self._bend[env_id] = 0
        self._steps[env_id] = 0

    def _frames(self, env_id: np.ndarray) -> np.ndarray:
        """uint8[n, SIZE, SIZE, 3]: a grey road on green that bends with the distance; the car is red."""
        ahead = 1 - np.arange(SIZE)[:, None] / SIZE
        car, bend = self._car[env_id, None, None], self._bend[env_id, None, None]
        middle = SIZE / 2 + SIZE / 6 * (3 * bend * ahead**2 - car)
        road = np.abs(np.arange(SIZE) - middle) < SIZE / 8
        frames = np.where(road[..., None], np.uint8([110, 110, 110]), np.uint8([100, 200, 100]))
        frames[:, 72:80, SIZE // 2 - 3 : SIZE // 2 + 3] = (200, 30, 30)
        return frames
