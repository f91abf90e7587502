"""Charts of few points: what is drawn, and whether the numbers at the axes can be read."""

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from covr_fast.reporting.charts import Charts, Look, rounds_axis
from covr_fast.reporting.statistics import Curve, Estimate


def ticks(axes):
    """Text and box of each number at the x axis."""
    FigureCanvasAgg(axes.figure).draw()
    low, high = axes.get_xlim()
    labels = [label for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
    return [(label.get_text(), label.get_window_extent()) for label in labels]


@pytest.mark.parametrize(
    "rounds, numbers", [([1], ["1"]), ([1, 2], ["1", "2"]), ([0, 1, 2], ["0", "1", "2"])]
)
def test_rounds_are_whole_numbers(rounds, numbers):
    with Charts().draw("a", "a") as chart:
        chart.axes.plot(rounds, np.ones(len(rounds)), "o")
        rounds_axis(chart.axes)
        assert [text for text, _ in ticks(chart.axes)] == numbers


@pytest.mark.parametrize("points", [1, 2])
def test_an_interval_is_seen_at_one_point_too(points):
    steps, mean = np.arange(1.0, points + 1), np.full(points, 5.0)
    with Charts().draw("a", "a") as chart:
        chart.curve(Curve(steps, mean, mean - 1, mean + 2, 3), Look.number(0))
        (interval,) = chart.axes.collections
        (path, *_) = interval.get_paths()
        assert (path.vertices[:, 1].min(), path.vertices[:, 1].max()) == (4, 7)
        strokes = interval.get_linewidth()[0]
        assert np.ptp(path.vertices[:, 0]) > 0 or strokes > 0


@pytest.mark.parametrize("low, high", [(-19.25, -18.7), (-1234, -1100), (0.001, 0.0031), (-0.5, 400)])
def test_the_numbers_below_intervals_do_not_touch(low, high):
    names = ["fast · covr\nagent.prior_weight=0.5\nreplay.augment=translate"] * 2
    with Charts().draw("a", "a", height=1.6) as chart:
        chart.intervals([Estimate(low, low, high), Estimate(high)], [Look.number(0)] * 2, names)
        boxes = [box for _, box in ticks(chart.axes)]
    assert len(boxes) >= 2
    assert all(right.x0 - left.x1 > 5 for left, right in pairwise(boxes))
