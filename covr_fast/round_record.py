"""What a round of fine-tuning selected, sample by sample: RUN/rounds/round-N.npz, from which reports draw."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import ops
from .files import replacing
from .streams import Fetch

SHOWN = 8
"""Frames of kept samples that are stored, and as many of dropped ones."""


@dataclass(frozen=True)
class RoundRecord:
    """D_f of a round as its filter saw it."""

    number: int
    """Of the round."""
    step: int
    """Environment steps at its start."""
    cutoff: float
    """Least score of a kept sample, by the threshold."""
    scores: Tensor
    """float32[M], the returns of D_f (or what `covr.score` says)."""
    weights: Fetch
    """float32[K] of the kept samples."""
    kept: Tensor
    """int64[K], positions in D_f."""
    episodes: Tensor
    """int64[M], the episode of each sample."""
    time: Tensor
    """int32[M], its step in the episode."""
    shown: Tensor
    """int64[n], the positions whose frames are stored: kept samples first, then dropped ones, each from the
    lowest score to the highest."""
    frames: Tensor
    """uint8[n, 3, H, W], as the VLM sees them."""

    def write(self, run: Path) -> None:
        """Writes RUN/rounds/round-N.npz.

        Raises:
            OSError: it could not be written; no part of it is left.
        """
        (weights,) = self.weights.read()
        content = {
            "step": np.int64(self.step),
            "cutoff": np.float64(self.cutoff),
            "returns": self.scores.numpy(),
            "time": self.time.numpy(),
            "episode": self.episodes.numpy(),
            "kept": self.kept.numpy(),
            "weights": weights.numpy(),
            "frame_at": self.shown.numpy(),
            "frames": self.frames.cpu().numpy(),
        }
        folder = run / "rounds"
        folder.mkdir(exist_ok=True)
        with replacing(folder / f"round-{self.number}.npz") as file:
            np.savez_compressed(file, **content)  # type: ignore[arg-type]


def drop_records(run: Path, done: int) -> None:
    """Removes the files of rounds after the first `done`, which a resumed run does again."""
    for path in (run / "rounds").glob("round-*.npz"):
        if int(path.stem.removeprefix("round-")) > done:
            path.unlink()


def choose_shown(scores: Tensor, kept: Tensor, stored: Tensor) -> Tensor:
    """Positions int64[n] in D_f of samples to show: evenly over the order of the scores float32[M] of those
    at `kept` int64[K], and of the others, among those that are `stored` bool[M]."""
    is_kept = torch.zeros(len(scores), dtype=torch.bool, device="cpu").index_fill_(0, kept, True)

    def spread(at: Tensor) -> Tensor:
        order = at[scores[at].argsort()]
        return order[np.linspace(0, len(order) - 1, min(SHOWN, len(order))).astype(np.int64)]

    return torch.cat([spread((chosen & stored).nonzero()[:, 0]) for chosen in (is_kept, ~is_kept)])


def weights_of(scores: Tensor, given: Tensor | None) -> Fetch:
    """float32[K] on their way to the host: the weights that were `given`, or those that RALW makes of the
    scores."""
    return Fetch(ops.return_weights(scores.float()) if given is None else given)
