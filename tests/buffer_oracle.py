"""The truth that the replay buffer is compared with: it stores every observation whole, and loops."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Step:
    obs: dict[str, np.ndarray]
    action: np.ndarray
    reward: float
    next_obs: dict[str, np.ndarray]
    terminated: bool
    truncated: bool
    extras: dict[str, np.ndarray]
    cut: bool = False

    @property
    def end(self) -> bool:
        return self.terminated or self.truncated or self.cut


@dataclass
class Oracle:
    """`streams[env][t]` is everything that was ever added."""

    num_envs: int
    n_step: int = 1
    gamma: float = 0.99
    streams: list[list[Step]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.streams = [[] for _ in range(self.num_envs)]

    def add(self, env: int, step: Step) -> int:
        self.streams[env].append(step)
        return (len(self.streams[env]) - 1) * self.num_envs + env

    def window(self, index: int) -> list[Step] | None:
        """The up to n steps that a sample with this id spans, or None if they are not complete."""
        stream, t = self.streams[index % self.num_envs], index // self.num_envs
        steps: list[Step] = []
        for step in stream[t : t + self.n_step]:
            steps.append(step)
            if step.end:
                return steps
        return steps if len(steps) == self.n_step else None

    def step(self, index: int) -> Step:
        return self.streams[index % self.num_envs][index // self.num_envs]

    def n_step_row(self, index: int) -> tuple[float, dict[str, np.ndarray], float, bool, bool]:
        """(reward, next_obs, discount, terminated, truncated) of a sample."""
        steps = self.window(index)
        assert steps is not None, (
            f"transition {index} was sampled before its {self.n_step} steps were complete"
        )
        reward = sum(self.gamma**k * step.reward for k, step in enumerate(steps))
        last = steps[-1]
        discount = 0.0 if last.terminated else self.gamma ** len(steps)
        return reward, last.next_obs, discount, last.terminated, last.truncated


@dataclass
class StackedEnv:
    """Frames of random bytes in stacks of `stack`, in episodes of random length; resets as `padding` says."""

    rng: np.random.Generator
    frame_shape: tuple[int, ...]
    stack: int
    padding: str = "repeat"  # or "zero" or "full" (as many new frames as the stack holds)
    max_length: int = 10
    channels_last: bool = False
    dtype: type = np.uint8

    def __post_init__(self) -> None:
        self.frames: list[np.ndarray] = []
        self.left = 0

    def _frame(self) -> np.ndarray:
        if self.dtype == np.uint8:
            return self.rng.integers(1, 256, self.frame_shape, dtype=np.uint8)
        return self.rng.standard_normal(self.frame_shape).astype(self.dtype)

    def observation(self) -> np.ndarray:
        return np.concatenate(self.frames[-self.stack :], axis=-1 if self.channels_last else 0)

    def reset(self) -> np.ndarray:
        newest = self._frame()
        older = {
            "repeat": [newest] * (self.stack - 1),
            "zero": [np.zeros_like(newest)] * (self.stack - 1),
            "full": [self._frame() for _ in range(self.stack - 1)],
        }[self.padding]
        self.frames = [*older, newest]
        self.left = int(self.rng.integers(1, self.max_length + 1))
        return self.observation()

    def step(self) -> tuple[np.ndarray, np.ndarray, bool, bool]:
        """(obs, next_obs, terminated, truncated); resets by itself."""
        obs = self.reset() if self.left == 0 else self.observation()
        self.frames = [*self.frames[-self.stack :], self._frame()]
        self.left -= 1
        ends = self.left == 0
        terminated = ends and bool(self.rng.integers(2))
        return obs, self.observation(), terminated, ends and not terminated
