"""Which transitions a batch is drawn from."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .. import _C
from ..border import CPU, address
from ..scalars import as_float, as_int


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
        object.__setattr__(self, "eta", as_float(self.eta, "eta"))
        object.__setattr__(self, "floor", as_int(self.floor, "floor"))
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
            object.__setattr__(self, name, as_float(getattr(self, name), name))
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must lie in [0, 1]")


Sampler = Literal["uniform", "prioritized", "recent"] | Uniform | Recent | Prioritized


def as_sampler(sampler: Sampler) -> Uniform | Recent | Prioritized:
    by_name = {"uniform": Uniform, "prioritized": Prioritized, "recent": Recent}
    if isinstance(sampler, str):
        if sampler not in by_name:
            raise ValueError(f"sampler is {sampler!r}: it must be one of {', '.join(by_name)}")
        return by_name[sampler]()
    if not isinstance(sampler, Uniform | Recent | Prioritized):
        raise TypeError(
            f"sampler is {sampler!r}: it must be one of {', '.join(by_name)}, or an object of them"
        )
    return sampler


class PriorityTree:
    """The memory of the priorities by row of the buffer; csrc/priorities.h works on it."""

    def __init__(self, core: Any, rows: int, num_envs: int, alpha: float) -> None:
        self._leaves = torch.zeros(rows, dtype=torch.float32, device=CPU)
        self._sums = torch.zeros(_C.sum_tree_inner_nodes(rows), dtype=torch.float64, device=CPU)
        self._largest = torch.ones(1, dtype=torch.float64, device=CPU)
        self._bounds = torch.zeros(2, num_envs, dtype=torch.int64, device=CPU)
        self._tree = address(self._leaves, torch.float32), address(self._sums, torch.float64)
        for where, tensor in zip(self._tree, (self._leaves, self._sums), strict=True):
            _C.prefer_huge_pages(where, tensor.nbytes)
        followed = address(self._largest, torch.float64), address(self._bounds, torch.int64)
        core.prioritize(*self._tree, *followed, rows, alpha)

    @property
    def nbytes(self) -> int:
        return self._leaves.nbytes + self._sums.nbytes

    def state_dict(self) -> dict[str, Tensor]:
        return {"priorities": self._leaves, "largest": self._largest, "bounds": self._bounds}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._largest.copy_(state["largest"])
        self._bounds.copy_(state["bounds"])
        n = len(self._leaves)
        rows = torch.arange(n, dtype=torch.int64, device=CPU)
        priorities = state["priorities"].to(CPU, torch.float32).contiguous()
        _C.sum_tree_update(self._leaves, self._sums, rows, priorities)
