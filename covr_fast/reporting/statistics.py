"""Statistics over seeds as Agarwal et al. 2021 recommend them: rliable's metrics, with 95 % intervals of a
bootstrap that is stratified by task.

The bootstrap is scipy's: that of rliable 1.2 needs arch 7, which cannot be imported beside pandas 3.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from rliable import metrics
from scipy.stats import bootstrap

REPETITIONS = 2000
"""Of the bootstrap."""
PAIRED_REPETITIONS = 500
"""The same for probabilities of improvement, whose rank tests take longer."""


class Estimate(NamedTuple):
    """A figure with its 95 % interval; one run has none (None)."""

    value: float
    low: float | None = None
    high: float | None = None


def iqm(scores: np.ndarray) -> Estimate:
    """Interquartile mean of float64[runs, tasks], the middle half of all scores. Of fewer than four scores
    that is the mean."""
    return _estimate(scores, metrics.aggregate_iqm)


def mean(scores: np.ndarray) -> Estimate:
    return _estimate(scores, metrics.aggregate_mean)


def median(scores: np.ndarray) -> Estimate:
    """Median of float64[runs, tasks]: over tasks, of the tasks' means; of a single task over its runs."""
    return _estimate(scores, np.median if scores.shape[1] == 1 else metrics.aggregate_median)


def improvement(scores: np.ndarray, base: np.ndarray) -> Estimate:
    """Probability that a run of `scores` float64[runs, tasks] returns more than one of `base` [runs', tasks]
    in the same task; ties count half, and tasks count alike."""
    tasks = scores.shape[1]

    def probability(*drawn: np.ndarray) -> float:
        ours, theirs = (np.stack(half, axis=1) for half in (drawn[:tasks], drawn[tasks:]))
        return float(metrics.probability_of_improvement(ours, theirs))

    samples = [*scores.T, *base.T]
    with np.errstate(all="ignore"):  # p-values of equal scores, which nobody reads
        value = probability(*samples)
        if min(len(scores), len(base)) < 2:
            return Estimate(value)
        low, high = _interval(samples, probability, PAIRED_REPETITIONS, vectorized=False)
    return Estimate(value, float(low), float(high))


class Curve(NamedTuple):
    """A figure over steps: means over runs and their 95 % intervals, float64[points] each."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray | None
    """None for a single run."""
    high: np.ndarray | None
    runs: int


def curve(series: Sequence[tuple[np.ndarray, np.ndarray]], most_points: int = 200) -> Curve | None:
    """The mean of several runs' (steps, values) over the steps that all of them cover, at the points where
    any has a value; the others are interpolated. None if there is no such step."""
    series = [(steps, values) for steps, values in series if len(steps)]
    if not series:
        return None
    first, last = max(steps[0] for steps, _ in series), min(steps[-1] for steps, _ in series)
    points = np.unique(np.concatenate([steps for steps, _ in series]))
    points = points[(first <= points) & (points <= last)]
    if not len(points):
        return None
    if len(points) > most_points:
        points = points[np.linspace(0, len(points) - 1, most_points).round().astype(int)]
    values = np.stack([np.interp(points, *own) for own in series])
    low = high = None
    if len(values) > 1:
        low, high = _interval([values], np.mean, axis=0)
    return Curve(points, values.mean(axis=0), low, high, len(values))


def _estimate(scores: np.ndarray, function: Callable[[np.ndarray], Any]) -> Estimate:
    value = float(function(scores))
    if len(scores) < 2:
        return Estimate(value)

    def drawn(*tasks: np.ndarray) -> float:
        return float(function(np.stack(tasks, axis=1)))

    low, high = _interval(list(scores.T), drawn, vectorized=False)
    return Estimate(value, float(low), float(high))


def _interval(
    samples: Sequence[np.ndarray],
    function: Callable[..., Any],
    repetitions: int = REPETITIONS,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % percentile interval of a function of samples, each of which is drawn from for itself; the same
    draws each time."""
    found = bootstrap(
        samples,
        function,
        n_resamples=repetitions,
        method="percentile",
        rng=np.random.default_rng(0),
        **options,
    ).confidence_interval
    return found.low, found.high
