"""Which transitions a batch is drawn from."""

import secrets
from dataclasses import dataclass
from typing import Literal

from ..scalars import as_float, as_int


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
