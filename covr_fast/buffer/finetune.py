"""D_f, the fine-tuning buffer of COVR, as a view of the replay buffer (Xia et al. 2026, Alg. 1)."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..scalars import as_float, as_int
from ..streams import send
from .replay import ReplayBuffer
from .transitions import spans


class FineTuneView:
    """The transitions of trajectories that finished since the last `clear`, with their returns.

    Nothing is copied: the view remembers how far each environment's stream was consumed, and reads indices
    and rewards from the buffer when they are asked for. Ids are on the host, and one call of
    `ops.discounted_returns` makes all returns where the buffer is. A trajectory is finished when it
    terminated, was truncated or was cut; without a `bootstrap`, a truncated trajectory counts as complete.
    Steps of an unfinished trajectory stay pending, also over a `clear`, until it ends. Transitions that the
    ring overwrote are no longer in the view; `overwritten` counts them.

    Args:
        buffer: the buffer to view, from its oldest transition on. Query the view in the thread that adds.
        gamma: discount of the returns.
        horizon: None for the return to the end of the trajectory, g_t = sum_{k=t..T} gamma^(k-t) r_k. A
            number h sums over at most h steps instead. Then a transition enters the view h steps after it was
            added (or at the end of its trajectory): with many parallel environments, no trajectory may have
            ended when the first round is due.
        bootstrap: the values V(s_{t+1}), float[n] on any device, of the states after the transitions with
            these ids, int64[n]. gamma * V is added to the last reward of a trajectory that was truncated or
            cut. None adds nothing, as in the paper.
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
        """int64 [M] on the CPU, ids of the view's transitions: environment by environment, each in order of
        time."""
        return torch.from_numpy(self._rows()["ids"])

    @property
    def returns(self) -> Tensor:
        """float32 [M] on the buffer's device, the discounted returns-to-go of `indices`."""
        _, start, stop = self._bounds()
        reach = self._reach(start, stop)
        reward, end = self._buffer.finished_rows(start, reach)
        if not len(reward):
            return reward
        # All environments are one column: where the part of one is over, nothing of the next may count.
        length = reach - start
        over = torch.from_numpy(np.cumsum(length[length > 0]) - 1)
        end.index_fill_(0, send(over, end.device), True)
        values = None if self.bootstrap is None else self._values_after(self.bootstrap, start, reach)
        returns = ops.discounted_returns(
            reward[:, None],
            end[:, None],
            self.gamma,
            horizon=self.horizon,
            bootstrap=None if values is None else values[:, None],
        )[:, 0]
        if self.horizon is None:
            return returns
        begin = np.cumsum(length) - length
        _, asked = spans(begin, begin + stop - start)
        return returns[send(torch.from_numpy(asked), returns.device)]

    @property
    def rewards(self) -> Tensor:
        """float32 [M] on the buffer's device, the rewards of `indices`."""
        _, start, stop = self._bounds()
        return self._buffer.finished_rows(start, stop)[0]

    @property
    def time_in_episode(self) -> Tensor:
        """int32 [M] on the CPU, how many steps into its episode each of `indices` is."""
        return torch.from_numpy(self._rows()["time"])

    @property
    def episodes(self) -> Tensor:
        """int64 [M] on the CPU, the episode of each of `indices`: the id of its first transition, stored or
        overwritten. So steps of an episode that enter the view later have the same number."""
        rows = self._rows()
        return torch.from_numpy(rows["ids"] - rows["time"].astype(np.int64) * self._buffer.num_envs)

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

    def _rows(self) -> dict[str, np.ndarray]:
        _, start, stop = self._bounds()
        return self._buffer.span_rows(start, stop)

    def _reach(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """The returns of start .. stop - 1 are sums of the rewards of start .. reach - 1."""
        if self.horizon is None:
            return stop
        _, _, count = self._buffer.stream_bounds()
        return np.where(stop > start, np.minimum(stop + self.horizon - 1, count), stop)

    def _values_after(
        self, bootstrap: Callable[[Tensor], Tensor], start: np.ndarray, stop: np.ndarray
    ) -> Tensor:
        """float32 on the buffer's device: V after those of these transitions that were truncated or cut, and
        zero after the others."""
        rows, device = self._buffer.span_rows(start, stop), self._buffer.device
        cut = np.flatnonzero(rows["end"] & ~rows["terminated"])
        values = torch.zeros(len(rows["end"]), dtype=torch.float32, device=device)
        if len(cut):
            value = bootstrap(torch.from_numpy(rows["ids"][cut])).detach()
            values[send(torch.from_numpy(cut), device)] = value.to(values)
        return values
