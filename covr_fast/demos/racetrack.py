"""A driver for the racetracks that reads the picture and follows the left edge of the road.

Pure pursuit (Coulter 1992): steer along the circle that leads from the rear axle to a point of the lane
ahead. The simulator's car is a kinematic bicycle, whose steering angle on a circle is atan(wheelbase x
curvature).
"""

import numpy as np

from ..env_config import EnvConfig
from ..evaluate import Policy

SIZE = 112
_METRE = 5.5  # in pixels
_WHEELBASE = 5.0  # metres; the car's centre is midway
_HALF_LANE = 2.5
_FULL_LOCK = np.pi / 4  # steering angle of an action of 1
_AHEAD = np.arange(1.5, 3.5, 0.25)  # metres ahead at which the driver looks for the line
_ASIDE = np.arange(0.5, 5.0, 0.1)  # metres to its left


PICTURES = EnvConfig(height=SIZE, width=SIZE, frame_stack=1, action_repeat=1)
"""What the driver reads: colour, at the simulator's resolution."""


def driver() -> Policy:
    """uint8[n, 3, 112, 112], as in `PICTURES` -> steering float32[n, 1].

    It keeps to the left lane. Where it sees neither its car nor the line, it goes straight on.
    """
    return lambda obs: np.array([[_steer(frame)] for frame in obs[:, -3:]], np.float32)


def _steer(frame: np.ndarray) -> float:
    heading = _heading(frame)
    if heading is None:
        return 0.0
    left = np.array([heading[1], -heading[0]])  # rows count downwards
    targets = []
    for ahead in _AHEAD:
        places = heading * ahead + left * _ASIDE[:, None]
        x, y = np.rint(places * _METRE + SIZE / 2).astype(int).T
        line = np.flatnonzero((frame[:, y, x] > 230).all(0))
        if len(line):
            targets.append((ahead, _ASIDE[line[0]] - _HALF_LANE))
    if not targets:
        return 0.0
    ahead, aside = np.array(targets).mean(0)
    ahead += _WHEELBASE / 2  # of the rear axle, which moves where the car points
    curvature = -2 * aside / (ahead**2 + aside**2)  # positive to the right, as the action
    return float(np.clip(np.arctan(_WHEELBASE * curvature) / _FULL_LOCK, -1, 1))


def _heading(frame: np.ndarray) -> np.ndarray | None:
    """Unit vector [2], x to the right and y down, from the middle of the car to that of its lights."""
    red, green, blue = frame.astype(int)
    car, lights = ((blue < 50) & (red == green) & (red > low) for low in (150, 230))
    if not lights.any():
        return None
    (car_y, car_x), (lights_y, lights_x) = (np.nonzero(mask) for mask in (car, lights))
    ahead = np.array([lights_x.mean() - car_x.mean(), lights_y.mean() - car_y.mean()])
    length = float(np.hypot(*ahead))
    return ahead / length if length else None
