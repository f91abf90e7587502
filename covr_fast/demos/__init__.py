"""Scripted drivers: reference rows beside what an agent learns."""

from ..errors import UserError
from ..evaluate import Policy
from . import car_racing, highway, racetrack


def driver(env_id: str) -> Policy:
    """The scripted driver of an environment. Its module's `camera` gives the pictures that it reads.

    Raises:
        UserError: the environment has none.
    """
    drivers = {
        "CarRacing-v3": car_racing.driver,
        "racetrack-v0": racetrack.driver,
        "racetrack-large-v0": racetrack.driver,
        "highway-v0": highway.driver,
    }
    if env_id not in drivers:
        raise UserError(f"env_id={env_id!r} has no scripted driver: choose {' or '.join(drivers)}")
    return drivers[env_id]()
