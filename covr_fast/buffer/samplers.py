"""Which transitions a batch is drawn from."""

import secrets
import threading
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .. import _C
from ..scalars import as_float, as_int
from . import processes


@dataclass(frozen=True)
class Uniform:
    """Every transition that can be sampled is equally likely."""


@dataclass(frozen=True)
class Recent:
    """Emphasizing recent experience (Wang & Ross 2019, "Boosting Soft Actor-Critic").

    Their k-th of K updates draws from the most recent max(N * eta^(1000 * k / K), floor) of N transitions.
    Here each row of a batch draws its own k / K uniformly in [0, 1): the same mixture, but K need not be
    known beforehand. "Most recent" is per environment, in proportion to what is stored of it.
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

    A transition with priority p is drawn with probability proportional to (p + 1e-6)^alpha. Until
    `update_priorities` sets p, it is the largest priority given so far. Importance weights are
    (N * probability)^-beta, divided by their maximum in the batch. `ReplayBuffer.beta` may be annealed.
    """

    alpha: float = 0.6
    beta: float = 0.4

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            object.__setattr__(self, name, as_float(getattr(self, name), name))
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must lie in [0, 1]")


SamplerSpec = Uniform | Recent | Prioritized
Sampler = Literal["uniform", "prioritized", "recent"] | SamplerSpec

SAMPLERS: dict[str, type[SamplerSpec]] = {"uniform": Uniform, "prioritized": Prioritized, "recent": Recent}


def as_sampler(sampler: Sampler) -> SamplerSpec:
    if isinstance(sampler, SamplerSpec):
        return sampler
    names = ", ".join(SAMPLERS)
    if not isinstance(sampler, str):
        raise TypeError(f"sampler is {sampler!r}: it must be one of {names}, or an object of them")
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}: it must be one of {names}")
    return SAMPLERS[sampler]()


def as_seed(seed: int | None) -> int:
    """None draws one."""
    if seed is None:
        return secrets.randbits(63)
    seed = as_int(seed, "seed")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}: it must lie in [0, 2**63)")
    return seed


class DrawSequence:
    """The sequence of batches that a seed determines: batch `number` depends on no batch before it.

    Attributes:
        seed: of the sequence. It changes when the first batch is drawn in another process.
        beta: of the importance weights; 0 without priorities.
        process: where the seed was last valid, as `processes.here` says.
    """

    def __init__(self, core: _C.Replay, sampler: SamplerSpec, rows: int, num_envs: int, seed: int) -> None:
        self.seed = seed
        self.process = processes.here()
        self._core = core
        self._count = 0
        self._lock = threading.Lock()
        self._recency = _C.Recency()
        if isinstance(sampler, Recent):
            self._recency = _C.Recency(sampler.eta**1000, sampler.floor)
        self.beta, self._priorities = 0.0, None
        if isinstance(sampler, Prioritized):
            self.beta = sampler.beta
            self._priorities = PriorityTree(core, rows, num_envs, sampler.alpha)

    def next_number(self) -> int:
        """The number of the batch that comes next, which then counts as drawn."""
        with self._lock:
            if (here := processes.here()) != self.process:
                self.process = here
                mixed = np.random.SeedSequence([self.seed, *here]).generate_state(1, np.uint64)
                self.seed = int(mixed[0]) >> 1
            self._count += 1
            return self._count - 1

    def draw(self, number: int, request: _C.BatchOut, threads: int) -> None:
        """Draws the ids of batch `number` into the request, and fills it."""
        if self._priorities is None:
            self._core.sample(request, self.seed, number, self._recency, threads)
        else:
            self._core.sample_prioritized(request, self.seed, number, self.beta, threads)

    def get(self, number: int, request: _C.BatchOut, threads: int) -> None:
        """Fills a request whose ids are given, with the augmentation of batch `number`."""
        self._core.get(request, self.seed, number, threads)

    @property
    def nbytes(self) -> int:
        return 0 if self._priorities is None else self._priorities.nbytes

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors share memory with this object."""
        state = {
            "sampling": torch.tensor([self.seed, self._count], dtype=torch.int64, device="cpu"),
            "beta": torch.tensor([self.beta], dtype=torch.float64, device="cpu"),
        }
        if self._priorities is not None:
            state |= self._priorities.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """`state` may have other tensors, too."""
        self.seed, self._count = state["sampling"].tolist()
        self.beta = float(state["beta"])
        if self._priorities is not None:
            self._priorities.load_state_dict(state)


class PriorityTree:
    """The memory of the priorities, one per row of the buffer. csrc/replay/priorities.h works on it."""

    def __init__(self, core: _C.Replay, rows: int, num_envs: int, alpha: float) -> None:
        self._leaves = torch.zeros(rows, dtype=torch.float32, device="cpu")
        self._sums = torch.zeros(_C.sum_tree_inner_nodes(rows), dtype=torch.float64, device="cpu")
        self._largest = torch.ones(1, dtype=torch.float64, device="cpu")
        self._bounds = torch.zeros(2, num_envs, dtype=torch.int64, device="cpu")
        for tensor in (self._leaves, self._sums):
            _C.prefer_huge_pages(tensor)
        core.prioritize(self._leaves, self._sums, self._largest, self._bounds, alpha)

    @property
    def nbytes(self) -> int:
        return self._leaves.nbytes + self._sums.nbytes

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "priority.priorities": self._leaves,
            "priority.largest": self._largest,
            "priority.bounds": self._bounds,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._largest.copy_(state["priority.largest"])
        self._bounds.copy_(state["priority.bounds"])
        rows = torch.arange(len(self._leaves), dtype=torch.int64, device="cpu")
        priorities = state["priority.priorities"].to("cpu", torch.float32).contiguous()
        _C.sum_tree_update(self._leaves, self._sums, rows, priorities)
