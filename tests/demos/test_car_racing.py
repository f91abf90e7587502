"""The scripted driver of CarRacing."""

import numpy as np
import pytest

from covr_fast.demos import camera, car_racing, driver
from covr_fast.errors import UserError
from covr_fast.evaluate import evaluate, random_policy


def test_it_follows_the_road_where_random_actions_earn_nothing():
    """200 frames: the road's start and its first curves."""
    config = camera("CarRacing-v3", 2, 200)
    assert min(evaluate(driver("CarRacing-v3"), config, 2, seed=0).returns) > 90
    assert evaluate(random_policy(2, 0), config, 2, seed=0).mean < 20


def test_it_steers_to_where_the_road_is():
    grass, road = (102, 204, 102), (105, 105, 105)
    stacks = np.empty((3, 9, 84, 84), np.uint8)
    stacks[:] = np.tile(grass, 3)[:, None, None]
    for stack, first in zip(stacks, (10, 33, 56), strict=True):
        stack[:, :, first : first + 18] = np.tile(road, 3)[:, None, None]
    (left, pedal), (straight, _), (right, _) = driver("CarRacing-v3")(stacks)
    assert left < -0.2 < straight < 0.2 < right
    assert pedal > 0  # nothing moved, so the car stands


@pytest.mark.parametrize("rows", [0, 4, 8, 12])
def test_it_sees_how_fast_it_drives(rows):
    """The ground moves `rows` rows down between two pictures, four frames of 1/50 s apart."""
    ground = np.random.default_rng(0).choice([105, 204, 230], (7, 7)).repeat(16, 0).repeat(16, 1)
    before, now = ground[20 : 20 + 84, :84], ground[20 - rows : 20 - rows + 84, :84]
    assert car_racing._speed(before, now) == pytest.approx(rows / 1.944 / 0.08, abs=3)


@pytest.mark.parametrize("level", [0, 180])
def test_it_goes_straight_on_where_it_sees_no_road(level):
    frames = np.zeros((2, 9, 84, 84), np.uint8)
    frames[:, 1::3] = level
    assert driver("CarRacing-v3")(frames)[:, 0].tolist() == [0, 0]


def test_who_has_no_driver_is_named():
    with pytest.raises(UserError, match="env_id='CheetahRun-v1' has no scripted driver: choose CarRacing-v3"):
        driver("CheetahRun-v1")
