"""The scripted driver of the highway."""

import numpy as np
import pytest

from covr_fast.demos import camera
from covr_fast.demos.highway import driver
from covr_fast.evaluate import evaluate


def picture(*cars: tuple[int, int], lane: int = 1) -> np.ndarray:
    """uint8[1, 3, 84, 252]: four lanes, the driver's car in one, others at (metres ahead, lanes to its right)
    from it."""
    frame = np.full((1, 3, 84, 252), 100, np.uint8)
    top = 42 - 6 - 12 * lane
    for edge in (top, top + 48):
        if 0 <= edge < 84:
            frame[..., edge, :] = 255
    for ahead, right in ((0, 0), *cars):
        colour = (50, 200, 0) if (ahead, right) == (0, 0) else (100, 200, 255)
        y, x = 42 + 12 * right, 76 + 3 * ahead
        frame[0, :, y - 3 : y + 3, x - 7 : x + 8] = np.array(colour)[:, None, None]
    return frame


LEFT, RIGHT, FASTER, SLOWER = [-1, 0], [1, 0], [0, 1], [0, -1]


@pytest.mark.parametrize(
    "frame, expected",
    [
        (picture(), FASTER),
        (picture((45, 0)), FASTER),
        (picture((20, 0)), RIGHT),
        (picture((20, 0), (0, 1)), LEFT),
        (picture((20, 0), (15, 1)), LEFT),
        (picture((20, 0), (0, 1), (5, -1)), SLOWER),
        (picture((20, 0), lane=3), LEFT),
        (picture((20, 0), (5, 1), lane=0), SLOWER),
    ],
)
def test_it_drives_around_a_slower_car_where_there_is_room(frame, expected):
    assert driver()(frame).tolist() == [expected]


def test_it_is_paid_more_than_going_slowly():
    env = camera("highway-v0", 20, 40)
    slow = evaluate(lambda obs: np.tile(np.float32(SLOWER), (len(obs), 1)), env, 20, seed=0)
    drives = evaluate(driver(), env, 20, seed=0)
    assert drives.mean > slow.mean + 3
