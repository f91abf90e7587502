"""Which samples of a round are held out: whole episodes."""

import hashlib

import numpy as np
import torch
from torch import Tensor


def split(weights: Tensor, episodes: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows that are held out and rows to train on, each int64 in ascending order.

    Neighbouring frames of an episode are near-copies, so an episode is held out as a whole: a loss on samples
    whose neighbours were trained on says how well the model knows these by heart.

    The episodes stand in an order that depends on `seed` and their numbers only. The first of them are held
    out: as many as bring the share of the samples closest to `share`, and at least one. The order is the same
    in every round, so when the later steps of an episode come in the next round, it has the same place. The
    episode of the sample with the largest weight is never held out, so there is always something to train on.
    With `share` 0, or if all samples are of one episode, nothing is held out.

    Args:
        weights: float32[N], return weights.
        episodes: int64[N], the episode of each sample.
    """
    numbers, place, sizes = np.unique(episodes.numpy(), return_inverse=True, return_counts=True)
    best = place[int(weights.argmax())]
    order = sorted((i for i in range(len(numbers)) if i != best), key=lambda i: _draw(seed, int(numbers[i])))
    chosen = np.zeros(len(numbers), dtype=bool)
    if share > 0 and order:
        missed = np.abs(sizes[order].cumsum() - share * len(weights))
        chosen[order[: int(missed.argmin()) + 1]] = True
    held_out = torch.from_numpy(chosen[place])
    return held_out.nonzero()[:, 0], (~held_out).nonzero()[:, 0]


def _draw(seed: int, episode: int) -> bytes:
    """The same random bytes for the same numbers, on every machine."""
    return hashlib.blake2b(f"{seed} {episode}".encode(), digest_size=8).digest()
