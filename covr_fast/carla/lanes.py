"""What a map says of lanes.

CARLA's lanes have the ids of OpenDRIVE: negative ones run along the road's own direction, on its right side,
positive ones against it; -1 and 1 are the innermost. CARLA's frame is left-handed: x forward, y right, z up.
"""

from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .connection import import_carla

if TYPE_CHECKING:
    import carla

AHEAD = 5.0
"""Metres before the car at which the lane's direction is taken (Zhang et al. 2021, DBC)."""
ROOM = 2.0
"""Fewest metres of width of a lane beside the traffic for a car to be parked on it."""
HALF_CAR = 1.1
"""Metres from a kerb to the middle of a car that is parked at it."""


def waypoint(world_map: "carla.Map", road: int, lane: int, s: float) -> Any:
    """The middle of a lane, s metres from the beginning of its road.

    Raises:
        UserError: the map has no such place.
    """
    found = world_map.get_waypoint_xodr(road, lane, s)
    if found is None:
        raise UserError(
            f"CARLA's map {world_map.name} has no lane {lane} of road {road} at {s:.1f} metres: "
            "use the maps of CARLA 0.9.16, for which the scenarios are made"
        )
    return found


def raised(place: Any, height: float) -> Any:
    """A transform that lies `height` metres above another one, so that what is spawned there is not stuck."""
    carla = import_carla()
    where = place.location
    return carla.Transform(carla.Location(where.x, where.y, where.z + height), place.rotation)


def lane_under(world_map: "carla.Map", location: "carla.Location") -> Any | None:
    """The driving lane at a location, or None: off the road."""
    return world_map.get_waypoint(location, project_to_road=False)


def heading(lane: Any | None) -> Any | None:
    """The direction of a lane AHEAD of a place on it, a unit Vector3D; None off the road, and where the lane
    ends."""
    ahead = lane.next(AHEAD) if lane is not None else []
    return ahead[0].transform.get_forward_vector() if ahead else None


def kerb(world_map: "carla.Map", road: int, side: int, s: float, beyond: float) -> Any:
    """A place beside the traffic, on the first lane that is wide enough to park on: a parking lane, a broad
    shoulder, or the sidewalk.

    Args:
        side: -1 is the road's right side, 1 its left.
        s: metres from the beginning of the road.
        beyond: metres from that lane's inner edge.

    Raises:
        UserError: the map has no such lane there.
    """
    carla = import_carla()
    lane = side
    while True:
        found = waypoint(world_map, road, lane, s)
        if found.lane_type != carla.LaneType.Driving and found.lane_width >= ROOM:
            outwards = found.transform.get_right_vector()
            where = found.transform.location + outwards * (beyond - found.lane_width / 2)
            return carla.Transform(where, found.transform.rotation)
        lane += side
