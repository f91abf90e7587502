"""#HW, a highway with up to ten vehicles ahead (Xia et al. 2026).

Which highway, and where the vehicles are, is unknown. These are the settings of the environment that
co-authors released with an earlier paper, its scenario "normal" (Xu et al. 2024, DMR: `scenario.json`).
"""

from typing import TYPE_CHECKING

import numpy as np

from .lanes import raised, waypoint
from .scene import Scenario, Scene

if TYPE_CHECKING:
    import carla

ROAD = 45
"""586 metres of Town04's highway, four lanes in our direction. After a curve it is straight."""
LANES = (-1, -2, -3, -4)
START = (100.0, 110.0)
"""Metres along the road between which our car starts."""
TRAFFIC = (115.0, 300.0)
"""The same for the vehicles ahead."""
VEHICLES = 10
BELOW_LIMIT = (-60.0, -30.0)
"""Percent by which they drive below the speed limit: negative, so they drive above it."""
GAP = 8.0
"""Fewest metres between two vehicles of one lane when an episode begins."""
TRIES = 10
"""Places drawn for each vehicle before it is left out."""


def draw_highway(world_map: "carla.Map", rng: np.random.Generator) -> Scene:
    """Our car in a random lane, and up to VEHICLES ahead of it."""
    taken = [(int(rng.choice(LANES)), rng.uniform(*START))]
    ego = waypoint(world_map, ROAD, *taken[0]).transform
    traffic = []
    for _ in range(VEHICLES * TRIES):
        lane, s = int(rng.choice(LANES)), rng.uniform(*TRAFFIC)
        if all(lane != other or abs(s - at) >= GAP for other, at in taken):
            taken.append((lane, s))
            place = waypoint(world_map, ROAD, lane, s).transform
            traffic.append((raised(place, 0.3), float(rng.uniform(*BELOW_LIMIT))))
        if len(traffic) == VEHICLES:
            break
    return Scene(raised(ego, 0.3), traffic=traffic)


HIGHWAY = Scenario("Town04", draw_highway)
