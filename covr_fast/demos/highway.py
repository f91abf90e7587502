"""A driver for the highway that reads the picture: fast while the lane is free, else around, else slower."""

import numpy as np

from ..env_config import EnvConfig
from ..evaluate import Policy

HEIGHT, WIDTH = 84, 252
_METRE = 3  # in pixels
_ROW, _COLUMN = 42, 75  # of the driver's car
_LANE = 4 * _METRE
_FREE = 30 * _METRE  # ahead of the car's centre
_BESIDE = slice(_COLUMN - 8 * _METRE, _COLUMN + 8 * _METRE)

_LEFT, _RIGHT, _FASTER, _SLOWER = (-1.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.0, -1.0)


PICTURES = EnvConfig(height=HEIGHT, width=WIDTH, frame_stack=1, action_repeat=1)
"""What the driver reads: colour, at the simulator's resolution."""


def driver() -> Policy:
    """uint8[n, 3, 84, 252], as in `PICTURES` -> actions float32[n, 2]."""
    return lambda obs: np.array([_decide(frame) for frame in obs[:, -3:]], np.float32)


def _decide(frame: np.ndarray) -> tuple[float, float]:
    red, _, blue = frame.astype(int)
    others = np.abs(red - blue) > 100  # cars in blue, and in red those that have crashed
    edges = np.flatnonzero((frame.min(0) > 200).mean(1) > 0.9)  # rows of the solid lines

    def lane(shift: int) -> np.ndarray:
        """bool[rows, WIDTH], the other cars in a lane; the one to the right has shift 1."""
        middle = _ROW + shift * _LANE
        rows: np.ndarray = others[middle - 4 : middle + 5]
        return rows

    def gap(cars: np.ndarray) -> int:
        ahead = np.flatnonzero(cars[:, _COLUMN + 8 :].any(0))
        return int(ahead[0]) if len(ahead) else WIDTH

    def is_road(shift: int) -> bool:
        middle = _ROW + shift * _LANE
        return not ((edges > min(middle, _ROW)) & (edges < max(middle, _ROW))).any()

    free = gap(lane(0))
    if free > _FREE:
        return _FASTER
    ways = [
        (gap(lane(shift)), action)
        for shift, action in ((1, _RIGHT), (-1, _LEFT))
        if is_road(shift) and not lane(shift)[:, _BESIDE].any() and gap(lane(shift)) > free
    ]
    return max(ways)[1] if ways else _SLOWER
