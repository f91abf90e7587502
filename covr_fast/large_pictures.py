"""Large colour pictures of an episode, for people to watch."""

from dataclasses import replace
from typing import Self

import numpy as np

from .env_config import EnvConfig
from .envs import PixelEnvs, make_env
from .tasks import find_task


class LargePictures:
    """Pictures of an episode by a second simulator, which draws them large.

    Simulators are deterministic: from the same seed and by the same actions the second one goes through the
    same episode, while the first one draws what the agent sees, as ever. If a task has no second simulator,
    or the two pay different rewards and so show different episodes, the pictures are those of the first.
    """

    def __init__(self, config: EnvConfig, seed: int):
        """The environment `config` with this seed, at the start of its first episode."""
        self._second: PixelEnvs | None = None
        self._total, self._over = 0.0, False
        if find_task(config).simulate_large is not None:
            self._second = make_env(replace(config, num_envs=1, batch_size=1, seed=seed), large=True)
            self._second.reset()

    def picture(self, first: np.ndarray, total: float) -> np.ndarray:
        """The present picture, uint8[H, W, 3].

        Args:
            first: uint8[H', W', 3], the first simulator's picture.
            total: the return so far in the first simulator.
        """
        if self._over or total != self._total:
            self.close()
        return first if self._second is None else self._second.picture(0)

    def step(self, action: np.ndarray) -> None:
        """Takes the decision [A] that the first simulator takes."""
        if self._second is not None:
            self._second.send(action[None], np.zeros(1, np.int64))
            rows = self._second.recv()
            self._total += float(rows.reward[0])
            self._over = bool(rows.terminated[0] or rows.truncated[0])

    def close(self) -> None:
        """Frees the second simulator."""
        if self._second is not None:
            self._second.close()
            self._second = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
