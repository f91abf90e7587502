"""How old stored priors are, in versions of the VLM's weights, and which of them still guide the agent.

A prior stays in the replay buffer after the weights that gave it were replaced; the paper uses it all the
same. With vlm.max_staleness, priors that are older than that are masked out of Eq. 4. They keep their
version, so it is known which weights gave them.
"""

import numpy as np

from .buffer import ReplayBuffer


def oldest_guiding(version: int, max_staleness: int | None) -> int:
    """The oldest version of the weights whose priors guide while `version` serves. None: all of them do."""
    return 0 if max_staleness is None else max(0, version - max_staleness)


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
    """Of the stored priors that guide: their share among all transitions, and their age in versions while
    `version` serves. From the host's tables: where rows come from the host, no device is waited for."""
    _, versions = stored_priors(buffer)
    ages = version - versions[versions >= oldest]
    figures = {"prior/usable_share": len(ages) / max(1, len(buffer))}
    if len(ages):
        figures |= {"prior/age_mean": float(ages.mean()), "prior/age_max": float(ages.max())}
    return figures
