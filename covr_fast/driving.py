"""EnvPool's driving tasks of the highway family: what their numbers do, and what their pictures show.

EnvPool 1.2.5 has the family of HighwayEnv (Leurent 2018, "An Environment for Autonomous Driving
Decision-Making") in C++, with its 2D renderer, which needs no OpenGL. One step is one decision of the driver:
a fifth of a second on the racetracks, one second on the highway.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import UserError

LANE_LEFT, IDLE, LANE_RIGHT, FASTER, SLOWER = range(5)
"""The actions of highway-v0."""

LEAST = 1 / 3
"""What a number of highway-v0 has to exceed to do anything."""


@dataclass(frozen=True)
class Drive:
    """A driving task as `tasks.Task` needs it."""

    action_dim: int
    to_sim: Callable[[np.ndarray], np.ndarray]
    """[n, action_dim] in [-1, 1] -> the simulator's actions."""
    steps_per_second: int
    """Steps per second of the simulator, which counts the length of an episode in seconds."""
    view: dict[str, Any] = field(default_factory=dict)
    """The simulator's options for what a picture shows. It is then resized to the size asked for."""
    large_view: dict[str, Any] = field(default_factory=dict)
    """The same for a large picture."""

    def options(self, env_id: str, max_episode_steps: int) -> dict[str, Any]:
        """EnvPool's options for pictures, and for episodes of `max_episode_steps` steps.

        Raises:
            UserError: such an episode does not last whole seconds.
        """
        # The simulator's own limit; EnvPool's max_episode_steps has no effect on these tasks.
        seconds, rest = divmod(max_episode_steps, self.steps_per_second)
        if rest:
            raise UserError(
                f"env.max_episode_steps={max_episode_steps}: episodes of {env_id} last whole seconds of "
                f"{self.steps_per_second} steps, so choose a multiple of {self.steps_per_second}"
            )
        return {"render_mode": "rgb_array", "duration": seconds, **self.view}


def five_actions(action: np.ndarray) -> np.ndarray:
    """Two numbers per row, (steer, pedal) [n, 2] in [-1, 1] -> the actions of highway-v0, int32[n].

    The number that is farther from 0 decides, so one decision never does both; of equal ones, steer. It is
    LANE_LEFT or LANE_RIGHT for a steer beyond -1/3 or 1/3, SLOWER or FASTER for such a pedal, else IDLE. The
    simulator ignores a lane change at the edge of the road, and FASTER and SLOWER at its limits of 30 and
    20 m/s.
    """
    steer, pedal = action[:, 0], action[:, 1]
    steers = np.abs(steer) >= np.abs(pedal)
    lane = np.where(steer < 0, LANE_LEFT, LANE_RIGHT)
    speed = np.where(pedal < 0, SLOWER, FASTER)
    idle = np.maximum(np.abs(steer), np.abs(pedal)) <= LEAST
    return np.where(idle, IDLE, np.where(steers, lane, speed)).astype(np.int32)


# The scale of the racetracks is fixed, 5.5 pixels a metre: 10 m to all sides, a second ahead of the car. So a
# large picture shows more of the road.
_TRACK = Drive(
    1,
    lambda action: action,
    5,
    {"screen_width": 112, "screen_height": 112},
    {"screen_width": 480, "screen_height": 480},
)

DRIVES = {
    "racetrack-v0": _TRACK,
    "racetrack-large-v0": _TRACK,
    # 84 m x 28 m at 3 pixels a metre: 59 m ahead of the car, and from any of the four lanes all others.
    "highway-v0": Drive(
        2,
        five_actions,
        1,
        {"screen_width": 252, "screen_height": 84, "scaling": 3.0},
        {"screen_width": 756, "screen_height": 252, "scaling": 9.0},
    ),
}
"""By EnvPool's id."""
