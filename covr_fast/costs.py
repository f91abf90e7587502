"""What the presets cost, as it was measured: seconds of a run with the preset's own VLM and agent."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Of a preset. None: never measured."""

    cpu: float | None = None
    """On two cores of an AMD EPYC, by its parts timed alone (`covr-fast bench PRESET`)."""
    gpu: float | None = None
    """On one GPU."""


COSTS: dict[str, Cost] = {}
"""By preset; measured on 2026-11-28. docs/results.md compares such figures with whole runs."""


def in_words(seconds: float | None) -> str:
    """For people: "50 s", "12 min", "3.4 h"."""
    if seconds is None:
        return "not measured"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def cost_of(preset: str) -> str:
    """A preset's cost for people."""
    cost = COSTS.get(preset, Cost())
    return f"two CPU cores: {in_words(cost.cpu)}, one GPU: {in_words(cost.gpu)}"
