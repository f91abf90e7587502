"""By what a group filters and weights the samples of its rounds, in words."""

from dataclasses import dataclass
from typing import Any

_SCORES = {"return": ("return", "returns"), "reward": ("reward", "rewards"), "q": ("Q value", "Q values")}


@dataclass(frozen=True)
class Rules:
    """A run's settings `covr.score`, `covr.filter` and `covr.weights` (docs/sweeps.md)."""

    settings: dict[str, Any]
    """By full names; COVR's where they are missing."""

    @property
    def score(self) -> str:
        """What a sample has: "return"."""
        return _SCORES[self._score][0]

    @property
    def scores(self) -> str:
        """What samples have: "returns"."""
        return _SCORES[self._score][1]

    @property
    def at_random(self) -> bool:
        """Whether the filter looks at no score. The threshold then says how many samples are kept."""
        return self._filter == "random"

    @property
    def threshold_unit(self) -> str:
        return "z-scores" if self._z_scores else self.scores

    @property
    def entropy(self) -> tuple[str, str]:
        """The entropy that Eq. 5 takes: its name in a round's record, and its unit."""
        mean = self.settings.get("covr.entropy") == "mean"
        return ("entropy_per_number", "nats per number of an action") if mean else ("entropy", "nats")

    @property
    def cut(self) -> str:
        """What the dashed line among the scores is."""
        if self.at_random:
            return "the threshold of Eq. 5, which only says how many are kept, at random"
        return f"the least {self.score} of the {self._top}" if self._filter == "top" else "the cutoff"

    @property
    def weight(self) -> str:
        """What the weights are."""
        return {"equal": "equal weight", "random": "random weight"}.get(self._weights, "RALW’s weight")

    def differences(self) -> list[str]:
        """In what they differ from COVR's."""
        said = []
        if self._score != "return":
            said.append(f"goes by {self.scores} instead of returns")
        if not self._z_scores and self._filter != "top":
            said.append("takes no z-scores")
        if self._filter != "eddf":
            kept = "random samples, as many as EDDF would" if self.at_random else f"the {self._top}"
            said.append(f"keeps {kept}")
        if self._weights != "returns":
            said.append("weights all samples alike" if self._weights == "equal" else "weights at random")
        return said

    @property
    def _score(self) -> str:
        return str(self.settings.get("covr.score", "return"))

    @property
    def _filter(self) -> str:
        return str(self.settings.get("covr.filter", "eddf"))

    @property
    def _top(self) -> str:
        return f"top {100 * self.settings.get('covr.top_share', 1):.0f} %"

    @property
    def _weights(self) -> str:
        return str(self.settings.get("covr.weights", "returns"))

    @property
    def _z_scores(self) -> bool:
        return bool(self.settings.get("covr.z_score", True))
