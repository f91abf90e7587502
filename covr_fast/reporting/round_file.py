"""RUN/rounds/round-N.npz: the samples of a fine-tuning round, and what the filter and RALW made of them."""

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class RoundFile:
    """A round's samples D_f."""

    number: int
    step: int
    """Environment steps when it began."""
    returns: np.ndarray
    """float32[M], in the score's unit."""
    time: np.ndarray
    """int32[M], decisions since the beginning of the episode."""
    kept: np.ndarray
    """bool[M], whether the filter kept a sample."""
    weights: np.ndarray
    """float32[K], RALW's weights of the kept samples."""
    weight_of: dict[int, float]
    """By position in D_f, the weight of a kept sample."""
    cutoff: float
    """The threshold in the unit of the returns."""
    frames: np.ndarray
    """uint8[n, 3, H, W], what the VLM sees of some samples."""
    frame_at: np.ndarray
    """int64[n], their positions in D_f."""


def read_rounds(run: Path) -> tuple[list[RoundFile], list[str]]:
    """The rounds of a run folder, in order, and a line for each file that cannot be read."""
    rounds, problems = [], []
    for path in (run / "rounds").glob("round-*.npz"):
        if (match := re.fullmatch(r"round-(\d+)\.npz", path.name)) is None:
            continue
        try:
            rounds.append(_read(path, int(match[1])))
        except (OSError, KeyError, ValueError, IndexError, EOFError, zipfile.BadZipFile) as error:
            problems.append(f"{path} cannot be read ({type(error).__name__}: {error})")
    return sorted(rounds, key=lambda each: each.number), sorted(problems)


def _read(path: Path, number: int) -> RoundFile:
    with np.load(path, allow_pickle=False) as file:
        returns, positions = file["returns"], file["kept"]
        weights, frame_at = file["weights"], file["frame_at"]
        kept = np.zeros(len(returns), bool)
        kept[positions] = True
        if len(weights) != len(positions) or len(frame_at) != len(file["frames"]):
            raise ValueError("its arrays do not fit together")
        if len(frame_at) and not 0 <= frame_at.min() <= frame_at.max() < len(returns):
            raise ValueError("a frame is of no sample")
        return RoundFile(
            number=number,
            step=int(file["step"]),
            returns=returns,
            time=file["time"],
            kept=kept,
            weights=weights,
            weight_of=dict(zip(positions.tolist(), weights.tolist(), strict=True)),
            cutoff=float(file["cutoff"]),
            frames=file["frames"],
            frame_at=frame_at,
        )
