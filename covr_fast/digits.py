"""Returns as text. Their size depends on the task, and their decimals follow from it: with a fixed number of
decimals, small returns would be printed as 0."""

import math

_LEAST = 1e-6
"""Smaller numbers have an exponent."""


def form(value: float, decimals: int) -> str:
    """The format of a number, such as ".1f": with so many decimals, or as many more as two significant digits
    take."""
    if not value or not math.isfinite(value):
        return f".{decimals}f"
    if abs(value) < _LEAST:
        return ".1e"
    return f".{max(decimals, 1 - math.floor(math.log10(abs(value))))}f"


def returns_text(*returns: float, decimals: int = 1) -> str:
    """Returns with spaces between them, each with the decimals of the largest: "12.0 3.4"."""
    used = form(max(map(abs, returns), default=0.0), decimals)
    return " ".join(format(value, used) for value in returns)


def mean_and_std(mean: float, std: float, decimals: int = 1) -> tuple[str, str]:
    """Both with the decimals of the larger: "344.2" and "101.3"."""
    used = form(max(abs(mean), std), decimals)
    return format(mean, used), format(std, used)


def spread_text(mean: float, std: float, count: int, decimals: int = 1) -> str:
    """The mean of `count` returns and their standard deviation, "344.2 ± 101.3"; of a single one the mean."""
    if count == 1:
        return returns_text(mean, decimals=decimals)
    return " ± ".join(mean_and_std(mean, std, decimals))


def evaluation_text(mean: float, std: float, episodes: int, decimals: int = 1) -> str:
    """ "344.2 ± 101.3 over 10 episodes"."""
    unit = "episode" if episodes == 1 else "episodes"
    return f"{spread_text(mean, std, episodes, decimals)} over {episodes} {unit}"
