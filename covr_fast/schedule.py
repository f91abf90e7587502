"""When something is due: what recurs, and the progressive rounds of fine-tuning (Xia et al. 2026)."""

from dataclasses import dataclass
from typing import Literal

from .errors import UserError

Rule = Literal["linear", "recurrence"]


def is_due(n: int, before: int, now: int) -> bool:
    """Whether what recurs every `n` steps is due after the steps from `before` to `now`; never if n is 0."""
    return n > 0 and now // n > before // n


@dataclass
class FineTuneSchedule:
    """Environment steps at which rounds are due; the number of steps psi between them grows.

    "linear": psi_{c+1} = psi_0 (c + 1), so rounds at 5k, 15k, 30k, 50k, 75k, as the paper's text and its five
    rounds in 100k steps say. "recurrence": psi_{c+1} = psi_c + psi_c c, as the paper prints it, so rounds at
    5k, 15k, 45k, 165k. A round that starts late does not delay the ones after it.
    """

    psi_0: int = 5000
    rule: Rule = "linear"
    rounds: int = 0
    """Rounds done, c."""

    def __post_init__(self) -> None:
        if self.psi_0 < 1:
            raise UserError(f"covr.psi_0={self.psi_0} must be at least 1 step")
        self.psi = self.psi_0
        self.next_round = self.psi_0
        done, self.rounds = self.rounds, 0
        for _ in range(done):
            self.advance()

    def due(self, step: int) -> bool:
        """Whether a round is due after `step` environment steps; never at step 0."""
        return step >= self.next_round

    def advance(self) -> None:
        """Counts a round as done."""
        self.rounds += 1
        if self.rule == "linear":
            self.psi = self.psi_0 * (self.rounds + 1)
        else:
            self.psi += self.psi * self.rounds
        self.next_round += self.psi
