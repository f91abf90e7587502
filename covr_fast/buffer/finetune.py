"""D_f, the fine-tuning buffer of COVR, as a view of the replay buffer (Xia et al. 2026, Alg. 1)."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..scalars import as_float, as_int
from .replay import ReplayBuffer


class FineTuneView:
    """The transitions of trajectories that finished since the last `clear`, with their returns.

    Nothing is copied: the view remembers how far each environment's stream was consumed, and reads indices
    and rewards from the buffer when they are asked for. A trajectory is finished when it terminated, was
    truncated or was cut; without a `bootstrap`, a truncated trajectory counts as complete. Steps of an
    unfinished trajectory stay pending, also over a `clear`, until it ends. Transitions that the ring
    overwrote are no longer in the view; `overwritten` counts them.

    Args:
        buffer: the buffer to view, from its oldest transition on. Query the view in the thread that adds.
        gamma: discount of the returns.
        horizon: None for the return to the end of the trajectory, g_t = sum_{k=t..T} gamma^(k-t) r_k. A
            number h sums over at most h steps instead. Then a transition enters the view h steps after it was
            added (or at the end of its trajectory): with many parallel environments, no trajectory may have
            ended when the first round is due.
        bootstrap: the values V(s_{t+1}), float[n], of the states after the transitions with these ids,
            int64[n]. gamma * V is added to the last reward of a trajectory that was truncated or cut. None
            adds nothing, as in the paper.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        gamma: float,
        horizon: int | None = None,
        bootstrap: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        gamma = as_float(gamma, "gamma")
        horizon = None if horizon is None else as_int(horizon, "horizon")
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"gamma is {gamma}: it must lie in [0, 1]")
        if horizon is not None and horizon < 1:
            raise ValueError(f"horizon is {horizon}: it must be at least 1, or None for whole trajectories")
        self.gamma = gamma
        self.horizon = horizon
        self.bootstrap = bootstrap
        self._buffer = buffer
        self._consumed = buffer.stream_bounds()[0]

    def __len__(self) -> int:
        _, start, stop = self._bounds()
        return int((stop - start).sum())

    @property
    def overwritten(self) -> int:
        """How many transitions the ring overwrote since the last `clear`. They are not in the view."""
        consumed, start, _ = self._bounds()
        return int((start - consumed).sum())

    @property
    def indices(self) -> Tensor:
        """int64 [M], ids of the view's transitions: environment by environment, each in order of time."""
        return torch.from_numpy(self._collect(self._ids))

    @property
    def returns(self) -> Tensor:
        """float32 [M], the discounted returns-to-go of `indices`."""
        return torch.from_numpy(self._collect(self._returns))

    @property
    def time_in_episode(self) -> Tensor:
        """int32 [M], how many steps into its episode each of `indices` is."""
        return torch.from_numpy(self._collect(lambda env, a, b: self._buffer.stream_rows(env, a, b)["time"]))

    def clear(self) -> None:
        """Empties the view. Steps of trajectories that have not finished stay pending."""
        self._consumed = self._bounds()[2]

    def state_dict(self) -> dict[str, Tensor]:
        """How far each stream was consumed. Everything else is in the buffer."""
        return {"consumed": torch.from_numpy(self._consumed.copy())}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        consumed = state["consumed"].numpy()
        if consumed.shape != self._consumed.shape:
            raise ValueError(
                f"the state is of {len(consumed)} environments, the buffer has {len(self._consumed)}"
            )
        self._consumed = consumed.copy()

    def _bounds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(consumed, start, stop) per stream: consumed .. stop - 1 finished since the last `clear`, of which
        start .. stop - 1 are stored."""
        first, ended, count = self._buffer.stream_bounds()
        stop = ended if self.horizon is None else np.maximum(ended, count - self.horizon + 1)
        stop = np.maximum(stop, self._consumed)
        return self._consumed, np.clip(first, self._consumed, stop), stop

    def _collect(self, part: Callable[[int, int, int], np.ndarray]) -> np.ndarray:
        _, start, stop = self._bounds()
        return np.concatenate([part(env, a, b) for env, (a, b) in enumerate(zip(start, stop, strict=True))])

    def _ids(self, env: int, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop, dtype=np.int64) * self._buffer.num_envs + env

    def _returns(self, env: int, start: int, stop: int) -> np.ndarray:
        if self.horizon is None:
            reward, end = self._rewards(env, start, stop)
            return _returns_to_go(reward, end, self.gamma)
        count = int(self._buffer.stream_bounds()[2][env])
        reward, end = self._rewards(env, start, min(stop + self.horizon - 1, count))
        return _horizon_returns(reward, end, self.gamma, self.horizon)[: stop - start]

    def _rewards(self, env: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rewards and ends of transitions start .. stop - 1, bootstrapped if asked for."""
        rows = self._buffer.stream_rows(env, start, stop)
        reward = rows["reward"]
        last = np.flatnonzero(rows["end"] & ~rows["terminated"])
        if self.bootstrap is not None and len(last):
            value = self.bootstrap(torch.from_numpy(self._ids(env, start, stop)[last]))
            reward[last] += self.gamma * value.detach().cpu().numpy()
        return reward, rows["end"]


def _returns_to_go(reward: np.ndarray, end: np.ndarray, gamma: float) -> np.ndarray:
    from ..ops import discounted_returns

    if not len(reward):
        return reward
    rewards, ends = torch.from_numpy(reward)[:, None], torch.from_numpy(end)[:, None]
    return discounted_returns(rewards, ends, gamma)[:, 0].numpy()


def _horizon_returns(reward: np.ndarray, end: np.ndarray, gamma: float, horizon: int) -> np.ndarray:
    """sum_{k=0..h-1} gamma^k r_{t+k}, which stops at the trajectory's end."""
    total = np.zeros(len(reward), np.float64)
    alive = np.ones(len(reward), bool)
    for k in range(min(horizon, len(reward))):
        n = len(reward) - k
        total[:n] += np.where(alive[:n], gamma**k * reward[k:], 0.0)
        alive[:n] &= ~end[k:]
    return total.astype(np.float32)
