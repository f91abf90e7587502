"""#GP, pedestrians who step out from behind parked cars (Xia et al. 2026).

Which street is unknown. This one, and the number of pedestrians, are of the scenario "jaywalk" of the
environment that co-authors released with an earlier paper (Xu et al. 2024, DMR). The parked cars, and when
and how fast the pedestrians walk, are ours.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from .connection import import_carla
from .lanes import HALF_CAR, kerb, raised, waypoint
from .scene import Pedestrian, Scenario, Scene

if TYPE_CHECKING:
    import carla

ROAD = 12
"""A straight street of Town01: 225 metres, one lane per direction."""
LANE = -1
START = (0.2, 2.2)
"""Metres along the street between which our car starts."""
PARKED = (25.0, 200.0)
"""Metres between which cars are parked, on both sides."""
SPACING = (12.0, 20.0)
"""Metres from one parked car to the next on the same side."""
PEDESTRIANS = 4
BEHIND = 3.5
"""Metres from the middle of a parked car to the pedestrian whom it hides, further down the street."""
SPEED = (1.0, 3.0)
"""Metres per second: from a walk to a run."""
TRIGGER = (12.0, 25.0)
"""Metres from our car at which a pedestrian starts."""


def draw_street(world_map: "carla.Map", rng: np.random.Generator) -> Scene:
    """Our car at the beginning of the street, cars along both kerbs, and pedestrians behind some of them."""
    ego = raised(waypoint(world_map, ROAD, LANE, rng.uniform(*START)).transform, 0.3)
    spots = [(side, s) for side in (-1, 1) for s in _along(rng)]
    parked = [raised(kerb(world_map, ROAD, side, s, HALF_CAR), 0.3) for side, s in spots]
    hiding = rng.choice(len(spots), size=PEDESTRIANS, replace=False)
    pedestrians = [
        _pedestrian(world_map, side, s, rng) for side, s in (spots[i] for i in sorted(hiding.tolist()))
    ]
    return Scene(ego, parked=parked, pedestrians=pedestrians)


def _along(rng: np.random.Generator) -> list[float]:
    """Where cars are parked on one side, in metres along the street."""
    places, s = [], PARKED[0] + rng.uniform(0, SPACING[0])
    while s <= PARKED[1]:
        places.append(s)
        s += rng.uniform(*SPACING)
    return places


def _pedestrian(world_map: "carla.Map", side: int, s: float, rng: np.random.Generator) -> Pedestrian:
    home = kerb(world_map, ROAD, side, s + BEHIND, HALF_CAR)
    across = kerb(world_map, ROAD, -side, s + BEHIND, HALF_CAR).location - home.location
    return Pedestrian(
        home=raised(home, 1.0),  # a pedestrian's location is that of their middle
        direction=across.make_unit_vector(),
        distance=across.length(),
        speed=float(rng.uniform(*SPEED)),
        trigger=float(rng.uniform(*TRIGGER)),
    )


class Crossing:
    """One pedestrian's way across the street."""

    def __init__(self, plan: Pedestrian) -> None:
        self._plan = plan
        self._begun = False

    def control(self, ego: "carla.Transform", walker: "carla.Location") -> Any | None:
        """The WalkerControl for the next frame; None while they wait.

        Args:
            ego: of our car; it comes from behind the parked car.
            walker: where the pedestrian is.
        """
        plan, carla = self._plan, import_carla()
        if not self._begun:
            gap = (plan.home.location - ego.location).dot(ego.get_forward_vector())
            if not 0 < gap < plan.trigger:
                return None
            self._begun = True
        walked = (walker - plan.home.location).dot(plan.direction)
        return carla.WalkerControl(plan.direction, plan.speed if walked < plan.distance else 0.0)


STREET = Scenario("Town01", draw_street, road=ROAD)
