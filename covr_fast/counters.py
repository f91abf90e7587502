"""What a run counts, and when a recurring event is due."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Counters:
    """How far a run is."""

    step: int = 0
    """Environment steps: decisions, summed over environments."""
    frames: int = 0
    """Simulator frames."""
    updates: int = 0
    """Policy updates."""
    returns: list[float] = field(default_factory=list)
    """Sum of rewards of each finished training episode, in the order in which they ended."""


class Every:
    """Says when an event that recurs every `n` steps is due; 0 means never. A multiple that was reached at
    step `start` is not due again."""

    def __init__(self, n: int, start: int = 0) -> None:
        self._n = n
        self._reached = start // n if n else 0

    def __call__(self, step: int) -> bool:
        """Whether a multiple of `n` was reached since the last call; several count once."""
        if not self._n:
            return False
        before, self._reached = self._reached, step // self._n
        return self._reached > before
