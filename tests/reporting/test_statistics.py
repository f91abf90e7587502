"""Figures over seeds, against hand calculations and a bootstrap written out here."""

import numpy as np
import pytest

from covr_fast.reporting.statistics import curve, improvement, iqm, mean, median


def column(*scores):
    return np.array(scores, np.float64)[:, None]


def test_the_iqm_is_the_mean_of_the_middle_half():
    found = iqm(column(1, 100, 3, 4, 5, 6, -70, 2))  # the middle: 2, 3, 4, 5
    assert found.value == 3.5
    assert found.low < 3.5 < found.high


def test_the_iqm_of_fewer_than_four_is_their_mean():
    assert iqm(column(1, 2, 9)).value == 4


def test_one_run_has_no_interval():
    for figure in (iqm, mean, median):
        assert figure(column(7)) == (7, None, None)


def test_the_median_of_one_task_is_over_its_runs_and_of_several_over_their_means():
    assert median(column(1, 2, 9)).value == 2
    assert median(np.array([[1.0, 10, 100], [3, 30, 300]])).value == 20


def test_intervals_are_those_of_a_stratified_bootstrap():
    """Runs are drawn for each task anew."""
    rng = np.random.default_rng(1)
    scores = rng.normal([0, 5], 1, (6, 2))
    draws = rng.integers(0, 6, (20_000, 6, 2))
    means = np.take_along_axis(scores[None], draws, axis=1).mean(axis=(1, 2))
    found = mean(scores)
    assert found.value == pytest.approx(scores.mean())
    width = np.diff(np.quantile(means, [0.025, 0.975]))[0]
    assert [found.low, found.high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.05 * width)


def test_a_difference_between_tasks_widens_no_interval():
    found = iqm(np.array([[0.0, 100.0]] * 4))
    assert found == (50, 50, 50)


def test_the_same_runs_give_the_same_interval_and_leave_the_generator_alone():
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    assert iqm(column(1, 5, 2, 8)) == iqm(column(1, 5, 2, 8))
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_improvement_counts_pairs_and_half_of_the_ties():
    better = [3.0, 5.0, 5.0]
    base = [1.0, 5.0]
    pairs = [(x > y) + 0.5 * (x == y) for x in better for y in base]
    found = improvement(column(*better), column(*base))
    assert found.value == pytest.approx(np.mean(pairs))
    assert found.low <= found.value <= found.high


def test_improvement_over_one_run_has_no_interval():
    assert improvement(column(3, 4), column(1)) == (1, None, None)


def test_improvement_is_averaged_over_tasks():
    ours, base = np.array([[2.0, 0.0], [3.0, 0.0]]), np.array([[1.0, 1.0], [1.0, 1.0]])
    assert improvement(ours, base).value == 0.5


def steps(*points):
    where, values = zip(*points, strict=True)
    return np.array(where, np.float64), np.array(values, np.float64)


def test_a_curve_is_the_mean_where_all_runs_have_one():
    found = curve([steps((0, 0), (100, 10), (200, 20)), steps((50, 7), (150, 17), (300, 32))])
    assert found.steps.tolist() == [50, 100, 150, 200]
    assert found.mean.tolist() == [(5 + 7) / 2, (10 + 12) / 2, (15 + 17) / 2, (20 + 22) / 2]
    assert found.runs == 2
    assert (found.low <= found.mean).all()
    assert (found.mean <= found.high).all()


def test_a_curve_of_one_run_has_no_band_and_of_none_or_disjoint_ones_there_is_none():
    one = curve([steps((10, 1), (20, 2))])
    assert (one.low, one.high, one.runs) == (None, None, 1)
    assert curve([]) is None
    assert curve([steps((0, 1), (1, 1)), steps((2, 1), (3, 1))]) is None
