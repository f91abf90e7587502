"""How old stored priors are, in versions of the VLM's weights, and which of them still guide the agent.

A prior stays in the replay buffer after the weights that gave it were replaced. Those that are not trusted
(`Trust`) are masked out of Eq. 4, for good. They keep their version, so it is known which weights gave them.
"""

from dataclasses import dataclass

import numpy as np

from .buffer import ReplayBuffer
from .config import TrainConfig


@dataclass(frozen=True)
class Trust:
    """Which versions of the weights give priors that guide."""

    first: int = 0
    """The first one, once it serves: with covr.trust_from="round" the version that ends the cold start."""
    max_staleness: int | None = None
    """By how many versions they may be older than the one that serves (vlm.max_staleness). None: by any."""

    @staticmethod
    def of(config: TrainConfig) -> "Trust":
        first = config.covr.cold_start if config.covr.trust_from == "round" else 0
        return Trust(first, config.vlm.max_staleness)

    def oldest(self, version: int) -> int:
        """The oldest version whose priors guide while `version` serves."""
        young = 0 if self.max_staleness is None else version - self.max_staleness
        return max(0, young, self.first if version >= self.first else 0)


def stored_priors(buffer: ReplayBuffer) -> tuple[np.ndarray, np.ndarray]:
    """(ids, versions), int64[n] each: the stored transitions that have a prior, and the versions of the
    weights that gave it. In the buffer's order, which is not that of time."""
    ring = buffer.ring("prior_version")
    env, place = np.nonzero(ring >= 0)
    ids = buffer.ids_at(env, place)
    stored = ids >= 0
    return ids[stored], ring[env[stored], place[stored]]


def mask_older(buffer: ReplayBuffer, oldest: int) -> None:
    """Stored priors of versions before `oldest` guide no more: their mask becomes 0."""
    if oldest > 0:
        ids, versions = stored_priors(buffer)
        old = ids[versions < oldest]
        buffer.set_extras(old, prior_mask=np.zeros(len(old), np.float32))


def age_figures(buffer: ReplayBuffer, version: int, oldest: int) -> dict[str, float]:
    """Of the stored priors of version `oldest` or newer, which may guide: their share among all transitions,
    and their age in versions while `version` serves; of the older ones: their share. From the host's tables:
    where rows come from the host, no device is waited for."""
    _, versions = stored_priors(buffer)
    ages = version - versions[versions >= oldest]
    total = max(1, len(buffer))
    figures = {
        "prior/usable_share": len(ages) / total,
        "prior/masked_share": (len(versions) - len(ages)) / total,
    }
    if len(ages):
        figures |= {"prior/age_mean": float(ages.mean()), "prior/age_max": float(ages.max())}
    return figures
