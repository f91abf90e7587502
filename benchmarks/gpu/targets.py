"""What the GPU check wants to see, and where in the stages' figures it is found."""

from collections.abc import Callable
from typing import Any, NamedTuple

Rows = dict[str, dict[str, Any]]


class Target(NamedTuple):
    stage: str
    what: str
    value: Callable[[Rows], float]
    """From the stage's figures. Raises KeyError where they do not have it."""
    aim: float
    at_least: bool
    """Else at most."""
    unit: str
    """As in `_UNITS`."""

    def met(self, value: float) -> bool:
        return value >= self.aim if self.at_least else value <= self.aim

    def wanted(self) -> str:
        return f"{'>=' if self.at_least else '<='} {shown(self.aim, self.unit)}"


_UNITS: dict[str, Callable[[float], str]] = {
    "%": lambda x: f"{x:.0%}",
    "/s": lambda x: f"{x:,.0f}/s",
    "us": lambda x: f"{x * 1e6:.1f} us",
    "ms": lambda x: f"{x * 1e3:.1f} ms",
    "x": lambda x: f"{x:.2f}x",
}


def shown(value: float, unit: str) -> str:
    return _UNITS[unit](value)


def row(rows: Rows, *parts: str) -> dict[str, Any]:
    """The first row whose name has all of these parts. Raises KeyError if none has."""
    for name, found in rows.items():
        if all(part in name for part in parts):
            return found
    raise KeyError(parts)


def share_of_limit(*parts: str) -> Callable[[Rows], float]:
    """The time that the bytes need at the bandwidth of a copy, over the time on the device."""

    def value(rows: Rows) -> float:
        found = row(rows, *parts)
        return found["limit"] / found["on_device"][0]

    return value


def on_device(*parts: str) -> Callable[[Rows], float]:
    return lambda rows: row(rows, *parts)["on_device"][0]


def seconds(contestant: str, *parts: str) -> Callable[[Rows], float]:
    return lambda rows: row(rows, *parts)["seconds"][contestant]


def rate(contestant: str, *parts: str) -> Callable[[Rows], float]:
    return lambda rows: 1 / seconds(contestant, *parts)(rows)


def gain(slow: Callable[[Rows], float], fast: Callable[[Rows], float]) -> Callable[[Rows], float]:
    return lambda rows: slow(rows) / fast(rows)


def overlapped(rows: Rows) -> float:
    """Over the longer of the two alone."""
    times = row(rows, "beside")["seconds"]
    return times["overlapped"] / max(times["policy"], times["tuner"])


_ALL, _HALF, _FROZEN = ("trained head-all",), ("trained head-half",), ("frozen head-all",)
_LOOP = "the loop with priors"
TARGETS = [
    Target(
        "gather", "512 x bfloat16, of copy bandwidth", share_of_limit("512 x bfloat16"), 0.8, True, "%"
    ),
    Target(
        "gather", "256 x float32 channels_last, of copy bandwidth", share_of_limit("channels_last"),
        0.8, True, "%",
    ),
    Target("update", "update as one graph", rate("graph", "update, "), 1500, True, "/s"),
    Target(
        "update", "update as one graph, bfloat16 convolutions",
        rate("bfloat16 graph", "update, "), 1500, True, "/s",
    ),
    Target(
        "update", "sample + update as one graph", rate("one graph", "sample + update"), 1500, True, "/s"
    ),
    Target(
        "update", "sample + update as one graph, bfloat16 convolutions",
        rate("one graph, bfloat16", "sample + update"), 1500, True, "/s",
    ),
    Target("filter", "1e6 returns", on_device("1000000"), 30e-6, False, "us"),
    Target("returns", "1e8 steps, of copy bandwidth", share_of_limit("1000000-100"), 0.5, True, "%"),
    Target("tree", "update + draw 256 of 1e6", on_device("sum_tree"), 15e-6, False, "us"),
    Target("frames", "random shift of 256, of copy bandwidth", share_of_limit("shift"), 0.6, True, "%"),
    Target(
        "linear", "all rows, speed against Liger's",
        gain(seconds("liger", *_ALL), seconds("ours", *_ALL)), 0.9, True, "x",
    ),
    Target(
        "linear", "half the rows weightless, speed against all rows",
        gain(seconds("ours, all rows", *_HALF), seconds("ours", *_HALF)), 1.8, True, "x",
    ),
    Target(
        "linear", "frozen head, speed against a trained one",
        gain(seconds("ours", *_ALL), seconds("ours", *_FROZEN)), 1.4, True, "x",
    ),
    Target(
        "prior", "64 frames of 84x84, 3B shape", seconds("ours", "default", "batch 64"), 75e-3, False, "ms"
    ),
    Target("overlap", "a round beside updates, over the longer", overlapped, 1.15, False, "x"),
    Target(
        "overlap", "steps/s with background priors, of those without",
        gain(seconds("off", _LOOP), seconds("background", _LOOP)), 0.9, True, "%",
    ),
]  # fmt: skip
