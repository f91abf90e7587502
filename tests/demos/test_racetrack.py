"""The scripted driver of the racetracks."""

import numpy as np
import pytest

from covr_fast.demos import camera
from covr_fast.demos.racetrack import driver
from covr_fast.evaluate import evaluate, random_policy


def test_it_stays_on_the_road_for_a_minute_and_is_paid_for_the_middle_of_the_lane():
    """A lap and a half; the most that 300 steps pay is 300."""
    (result,) = evaluate(driver(), camera("racetrack-v0", 1, 300), 1, seed=0).returns
    assert result > 270


def test_random_steering_leaves_the_road_at_once():
    assert evaluate(random_policy(1, 0), camera("racetrack-v0", 4, 300), 4, seed=0).mean < 20


def test_the_large_track_s_road_ends_after_its_first_curve():
    """As docs/environments.md says: the driver is paid for about 55 steps, whatever the limit."""
    (result,) = evaluate(driver(), camera("racetrack-large-v0", 1, 300), 1, seed=0).returns
    assert 48 < result < 56


@pytest.mark.parametrize("level", [0, 100])
def test_it_goes_straight_on_where_it_sees_no_car(level):
    assert driver()(np.full((2, 3, 112, 112), level, np.uint8)).tolist() == [[0], [0]]
