"""Environments on CARLA servers with EnvPool's interface: the step after an episode's end is the reset."""

import atexit
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from .address import Address, lease, release
from .drive import Drive


class CarlaSimulator:
    """A batch of environments, each on a server of its own. They simulate at the same time."""

    def __init__(self, open_drive: Callable[[Address, int], Drive], num_envs: int, first: Address) -> None:
        """Connects to the first `num_envs` servers from `first` on that this process does not use yet.

        Args:
            open_drive: the address of a server and the number of an environment -> the environment.
        """
        self._addresses = [lease(first) for _ in range(num_envs)]
        self._drives: list[Drive] = []
        self._over = np.zeros(num_envs, bool)
        self._threads = ThreadPoolExecutor(num_envs, "covr-carla")
        atexit.register(self.close)  # a server in synchronous mode stands still when its client goes away
        try:
            for number, address in enumerate(self._addresses):
                self._drives.append(open_drive(address, number))
        except BaseException:
            self.close()
            raise

    def reset(self) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins an episode in every environment; returns pictures uint8[num_envs, H, W, 3]."""
        return np.stack(list(self._threads.map(self._begin, range(len(self._drives))))), {}

    def step(
        self, action: np.ndarray, env_id: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Simulates one frame in the environments of int[n] with actions float[n, 2] (see Drive.step). One
        whose episode has ended ignores its action and begins the next, with reward 0.

        Returns:
            Pictures uint8[n, H, W, 3], reward float32[n], terminated bool[n], truncated bool[n], and an empty
            dict.
        """
        rows = list(self._threads.map(self._step, env_id.tolist(), action.tolist()))
        pictures, reward, terminated, truncated = zip(*rows, strict=True)
        return (
            np.stack(pictures),
            np.array(reward, np.float32),
            np.array(terminated, bool),
            np.array(truncated, bool),
            {},
        )

    def close(self) -> None:
        """Destroys what was spawned and gives the servers back."""
        atexit.unregister(self.close)
        self._threads.shutdown()
        while self._drives:
            self._drives.pop().close()
        while self._addresses:
            release(self._addresses.pop())

    def _begin(self, i: int) -> np.ndarray:
        self._over[i] = False
        return self._drives[i].reset()

    def _step(self, i: int, action: list[float]) -> tuple[np.ndarray, float, bool, bool]:
        if self._over[i]:
            return self._begin(i), 0.0, False, False
        row = self._drives[i].step(*action)
        self._over[i] = row[2] or row[3]
        return row
