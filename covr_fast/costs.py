"""What the presets cost, as it was measured: seconds of a run with the preset's own VLM and agent."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Of a preset. None: never measured."""

    cpu: float | None = None
    """On two cores of an AMD EPYC, by its parts timed alone (`covr-fast bench PRESET`)."""
    gpu: float | None = None
    """On one GPU."""


COSTS: dict[str, Cost] = {
    "carracing": Cost(cpu=330),
    "carracing-full": Cost(cpu=1_000),
    "racetrack": Cost(cpu=500),
    "highway": Cost(cpu=420),
    "cartpole-swingup": Cost(cpu=10_000),
    "reacher-easy": Cost(cpu=20_000),
    "cheetah-run": Cost(cpu=21_000),
    "walker-walk": Cost(cpu=43_000),
    "finger-spin": Cost(cpu=41_000),
    "ball-in-cup-catch": Cost(cpu=20_000),
    "hopper-hop": Cost(cpu=100_000),
    "walker-run": Cost(cpu=210_000),
    "pendulum-swingup": Cost(cpu=100_000),
}
"""By preset, measured on 2026-11-28; docs/results.md compares such figures with whole runs. Those with a
pretrained VLM, CARLA's, and one's own environment have none."""


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
