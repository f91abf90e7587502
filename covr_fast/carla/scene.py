"""Who stands where when an episode begins. Scenes are drawn from a map and a generator alone: no server."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import carla


@dataclass(frozen=True)
class Pedestrian:
    """One who waits, and crosses the street as the car comes near."""

    home: "carla.Transform"
    """Where they wait, out of sight."""
    direction: "carla.Vector3D"
    """Unit vector across the street."""
    distance: float
    """Metres to walk."""
    speed: float
    """Metres per second."""
    trigger: float
    """They start when the car is less than these metres away, along its lane."""


@dataclass(frozen=True)
class Scene:
    """The beginning of an episode."""

    ego: "carla.Transform"
    """Where our car starts."""
    traffic: list[tuple["carla.Transform", float]] = field(default_factory=list)
    """Cars of the traffic manager, and by how many percent each drives below the speed limit."""
    parked: list["carla.Transform"] = field(default_factory=list)
    pedestrians: list[Pedestrian] = field(default_factory=list)


@dataclass(frozen=True)
class Scenario:
    """A kind of scene, and where it takes place."""

    map_name: str
    draw: Callable[["carla.Map", np.random.Generator], Scene]
    """A scene.

    Raises:
        UserError: the map is not the one that the scenario is made for.
    """
    road: int | None = None
    """An episode ends where this road does. None: it goes on along the roads that follow."""
