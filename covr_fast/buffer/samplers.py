"""Which transitions a batch is drawn from."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .. import _C


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
    """The memory of the priorities by row of the buffer; csrc/priorities.h works on it."""

    def __init__(self, core: Any, rows: int, num_envs: int, alpha: float) -> None:
        self._leaves = torch.zeros(rows)
        self._sums = torch.zeros(_C.sum_tree_inner_nodes(rows), dtype=torch.float64)
        self._largest = torch.ones(1, dtype=torch.float64)
        self._bounds = torch.zeros(2, num_envs, dtype=torch.int64)
        for tensor in (self._leaves, self._sums):
            _C.prefer_huge_pages(tensor.data_ptr(), tensor.nbytes)
        memory = (self._leaves, self._sums, self._largest, self._bounds)
        core.prioritize(*(tensor.data_ptr() for tensor in memory), rows, alpha)

    @property
    def nbytes(self) -> int:
        return self._leaves.nbytes + self._sums.nbytes

    def state_dict(self) -> dict[str, Tensor]:
        return {"priorities": self._leaves, "largest": self._largest, "bounds": self._bounds}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._largest.copy_(state["largest"])
        self._bounds.copy_(state["bounds"])
        priorities = state["priorities"].contiguous()
        rows, n = torch.arange(len(self._leaves)), len(self._leaves)
        _C.sum_tree_update(
            self._leaves.data_ptr(), self._sums.data_ptr(), n, rows.data_ptr(), priorities.data_ptr(), n
        )
