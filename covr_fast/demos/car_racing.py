"""A driver for CarRacing that reads the pictures: it follows the middle of the road, and brakes for curves.

It steers towards the road at a distance ahead that grows with its speed (pure pursuit, Coulter 1992), and
aims for a speed that falls with how far the road turns away ahead. It sees its speed by how far the ground
moved between two pictures. Lengths are in units of the simulator: the road is 13.3 wide.
"""

import numpy as np

from ..env_config import EnvConfig
from ..evaluate import Policy

SIZE = 84
_REPEAT = 4
_SECONDS = _REPEAT / 50  # between two pictures
_CAR = np.array([72.0, 42.0])  # row and column
_SCALE = np.array([1.944, 1.361])  # rows and columns of a unit

# Places on circles around the car, at angles from straight ahead, positive to the right.
_RADII = np.arange(5.0, 36.0, 2.0)
_ANGLES = np.radians(np.arange(-105, 106, 3))
_CIRCLES = _CAR + _SCALE * (
    _RADII[:, None, None] * np.stack([-np.cos(_ANGLES), np.sin(_ANGLES)], -1)
)  # [radius, angle, 2]

# Where a place of one picture is in the next, if the car drove and turned so far in between.
_DRIVEN = np.arange(0.0, 7.6, 0.25)  # units
_TURNED = np.arange(-0.12, 0.13, 0.04)  # radians, to the right
_GROUND = np.stack(np.meshgrid(np.arange(4.0, 66, 2), np.arange(4.0, 80, 2), indexing="ij"), -1).reshape(
    -1, 2
)


def _moved() -> np.ndarray:
    """Pixels int64[driven, turned, place, 2] of the places of _GROUND after each movement."""
    places = (_GROUND - _CAR) / _SCALE
    places = places + np.stack([_DRIVEN, 0 * _DRIVEN], -1)[:, None, None]
    cos, sin = np.cos(_TURNED)[:, None], np.sin(_TURNED)[:, None]
    down, right = places[..., 0], places[..., 1]
    # A car that turns to the right sees the ground turn to the left.
    turned = np.stack([cos * down - sin * right, sin * down + cos * right], -1)
    pixels: np.ndarray = np.rint(_CAR + _SCALE * turned).astype(int)
    return pixels.clip(0, SIZE - 1)


_AFTER = _moved()


PICTURES = EnvConfig(height=SIZE, width=SIZE, frame_stack=3, action_repeat=_REPEAT)
"""What the driver reads: 84x84 in colour, three of them, four frames apart."""


def driver() -> Policy:
    """uint8[n, 9, 84, 84], as in `PICTURES` -> float32[n, 2], steering and gas or brake.

    Where it sees no road it goes slowly straight on.
    """
    return lambda obs: np.array([_act(stack) for stack in obs], np.float32)


def _act(stack: np.ndarray) -> tuple[float, float]:
    green = stack[1::3].astype(np.int16)
    speed = _speed(green[-2], green[-1])
    bearings = _bearings(stack[-3:].astype(np.int16))
    if not len(bearings):
        return 0.0, _pedal(speed, 15.0)
    ahead = int(np.searchsorted(_RADII, 7 + 0.12 * speed))
    bearing = bearings[min(ahead, len(bearings) - 1)]
    bend = np.abs(bearings[_RADII[: len(bearings)] < 30]).max()
    return float(np.clip(0.8 * bearing, -1, 1)), _pedal(speed, max(66 - 55 * bend, 25.0))


def _pedal(speed: float, wanted: float) -> float:
    """Gas below the wanted speed, brake well above it, nothing in between."""
    if speed < wanted:
        return float(np.clip((wanted - speed) / 20, 0.05, 0.6))
    return -0.4 if speed > wanted + 8 else 0.0


def _bearings(frame: np.ndarray) -> np.ndarray:
    """Radians [up to radii], to the middle of the road on each circle, from the nearest one outwards.

    Off the road they begin with the first circle that crosses it; they end where it leaves the picture.
    """
    red, green, _ = frame
    rows, columns = np.rint(np.moveaxis(_CIRCLES, -1, 0)).astype(int)
    inside = (rows >= 0) & (rows < SIZE) & (columns >= 0) & (columns < SIZE)
    rows, columns = rows.clip(0, SIZE - 1), columns.clip(0, SIZE - 1)
    road = inside & (green[rows, columns] - red[rows, columns] < 50) & (green[rows, columns] > 50)
    found: list[float] = []
    for circle in road:
        places = np.flatnonzero(circle)
        if not len(places):
            if found:
                break
            continue
        runs = np.split(places, np.flatnonzero(np.diff(places) > 2) + 1)
        last = found[-1] if found else 0.0
        middles = [float(_ANGLES[run].mean()) for run in runs]
        nearest = min(middles, key=lambda middle: abs(middle - last))
        if found and abs(nearest - last) > 0.6:
            break
        found.append(nearest)
    return np.array(found)


def _speed(before: np.ndarray, now: np.ndarray) -> float:
    """Units per second by which the ground moved towards the car between two pictures [84, 84]."""
    rows, columns = _GROUND.astype(int).T
    change = np.abs(now[_AFTER[..., 0], _AFTER[..., 1]] - before[rows, columns]).clip(max=25).mean(-1)
    return float(_DRIVEN[np.unravel_index(change.argmin(), change.shape)[0]] / _SECONDS)
