"""Which transitions a batch is drawn from."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Uniform:
    """Every transition that can be sampled is equally likely."""


@dataclass(frozen=True)
class Recent:
    """Emphasizing recent experience (Wang & Ross 2019, "Boosting Soft Actor-Critic").

    Their k-th of K updates draws from the most recent max(N * eta^(1000 * k / K), floor) of N transitions.
    Here each row of a batch draws its own k / K uniformly in [0, 1), which is the same mixture without the
    need to know K beforehand. "Most recent" is meant per environment, in proportion to what it holds.
    """

    eta: float = 0.996
    floor: int = 5000

    def __post_init__(self) -> None:
        if not 0.0 < self.eta < 1.0:
            raise ValueError(f"eta is {self.eta}: it must lie strictly between 0 and 1")
        if self.floor < 1:
            raise ValueError(f"floor is {self.floor}: it must be at least 1")


@dataclass(frozen=True)
class Prioritized:
    """Proportional prioritized replay (Schaul et al. 2016).

    A transition with priority p is drawn with probability proportional to (p + 1e-6)^alpha; it has the
    largest priority given so far until `update_priorities` says otherwise. Importance weights are (N *
    probability)^-beta, divided by their maximum in the batch. `ReplayBuffer.beta` may be annealed.
    """

    alpha: float = 0.6
    beta: float = 0.4

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must lie in [0, 1]")


Sampler = Literal["uniform", "prioritized", "recent"] | Uniform | Recent | Prioritized


def as_sampler(sampler: Sampler) -> Uniform | Recent | Prioritized:
    by_name = {"uniform": Uniform, "prioritized": Prioritized, "recent": Recent}
    if isinstance(sampler, str):
        if sampler not in by_name:
            raise ValueError(f"sampler is {sampler!r}: it must be one of {', '.join(by_name)}")
        return by_name[sampler]()
    return sampler


class PriorityTree:
    """Priorities by row of the buffer, zero wherever nothing can be sampled."""

    _EPSILON = 1e-6

    def __init__(self, rows: int, limits: np.ndarray, alpha: float) -> None:
        from ..ops import SumTree

        self._tree = SumTree(rows, "cpu")
        self._alpha = alpha
        self._limits = limits
        self._rows_per_stream = rows // len(limits)
        self._largest = 1.0
        self._first = np.zeros(len(limits), np.int64)
        self._ready = np.zeros(len(limits), np.int64)

    def follow(self, first: np.ndarray, ready: np.ndarray) -> None:
        """The transitions that can be sampled are now first .. ready - 1 of every stream."""
        gone = self._rows(self._first, np.minimum(first, self._ready))
        new = self._rows(np.maximum(first, self._ready), ready)
        self._first, self._ready = first.copy(), ready.copy()
        rows = np.concatenate([gone, new])  # in this order: a new transition may lie where the old one was
        priorities = np.zeros(len(rows), np.float32)
        priorities[len(gone) :] = self._largest
        self._tree.update(torch.from_numpy(rows), torch.from_numpy(priorities))

    def _rows(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Rows of the transitions start .. stop - 1 of every stream, stream after stream."""
        length = np.maximum(stop - start, 0)
        stream = np.repeat(np.arange(len(length)), length)
        t = np.arange(length.sum()) + np.repeat(start - np.cumsum(length) + length, length)
        return stream * self._rows_per_stream + t % self._limits[stream]

    def draw(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """(rows int64 [n], their probabilities float64 [n])."""
        return self._tree.sample(n, torch.Generator().manual_seed(seed))

    def set(self, ids: np.ndarray, rows: np.ndarray, priority: np.ndarray) -> None:
        """New priorities. Rows < 0, and transitions that cannot be sampled yet, are skipped."""
        time, stream = np.divmod(ids, len(self._limits))
        keep = (rows >= 0) & (time < self._ready[stream])
        if not keep.any():
            return
        leaves = ((priority[keep] + self._EPSILON) ** self._alpha).astype(np.float32)
        self._largest = max(self._largest, float(leaves.max()))
        self._tree.update(torch.from_numpy(rows[keep]), torch.from_numpy(leaves))

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "priorities": self._tree.priorities,
            "largest": torch.tensor([self._largest], dtype=torch.float64),
            "bounds": torch.from_numpy(np.stack([self._first, self._ready])),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        priorities = state["priorities"]
        self._tree.update(torch.arange(len(priorities)), priorities)
        self._largest = float(state["largest"])
        self._first, self._ready = state["bounds"].numpy().copy()
