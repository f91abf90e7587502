"""The others: vehicles, parked cars and pedestrians of one episode."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from .connection import Server, import_carla
from .scene import Pedestrian, Scene
from .street import Crossing

if TYPE_CHECKING:
    import carla


class Others:
    """Everybody but our car, on one server."""

    def __init__(self, server: Server, rng: np.random.Generator) -> None:
        library = server.world.get_blueprint_library()
        self._server = server
        self._rng = rng
        self._cars = sorted(filter(_is_car, library.filter("vehicle.*")), key=lambda b: b.id)
        self._people = sorted(library.filter("walker.pedestrian.*"), key=lambda b: b.id)
        if not self._cars or not self._people:
            raise UserError(f"the CARLA server at {server.address} has no cars or no pedestrians to spawn")
        self._ids: list[int] = []
        self._walkers: list[tuple[Any, Crossing]] = []

    def spawn(self, scene: Scene) -> None:
        """Spawns a scene's others. One whose place is blocked is left out."""
        for place, below_limit in scene.traffic:
            self._drive(place, below_limit)
        for place in scene.parked:
            self._park(place)
        for plan in scene.pedestrians:
            self._wait(plan)

    def move(self, ego: "carla.Transform") -> None:
        """Tells the pedestrians what to do in the next frame, with our car at `ego`. The traffic manager
        drives the vehicles."""
        for walker, crossing in self._walkers:
            if walker.is_alive:
                control = crossing.control(ego, walker.get_location())
                if control is not None:
                    walker.apply_control(control)

    def destroy(self) -> None:
        """Removes them all."""
        carla = import_carla()
        ids, self._ids, self._walkers = self._ids, [], []
        if ids:
            self._server.client.apply_batch_sync([carla.command.DestroyActor(each) for each in ids], False)

    def _drive(self, place: "carla.Transform", below_limit: float) -> None:
        car = self._spawn(self._cars, place)
        if car is not None:
            traffic = self._server.traffic
            car.set_autopilot(True, traffic.get_port())
            traffic.vehicle_percentage_speed_difference(car, below_limit)
            traffic.auto_lane_change(car, True)
            traffic.ignore_lights_percentage(car, 100.0)

    def _park(self, place: "carla.Transform") -> None:
        car = self._spawn(self._cars, place)
        if car is not None:
            car.apply_control(import_carla().VehicleControl(hand_brake=True))

    def _wait(self, plan: Pedestrian) -> None:
        walker = self._spawn(self._people, plan.home)
        if walker is not None:
            self._walkers.append((walker, Crossing(plan)))

    def _spawn(self, blueprints: list[Any], place: "carla.Transform") -> Any | None:
        actor = self._server.world.try_spawn_actor(blueprints[self._rng.integers(len(blueprints))], place)
        if actor is not None:
            self._ids.append(actor.id)
        return actor


def _is_car(blueprint: "carla.ActorBlueprint") -> bool:
    """Whether it is a car: no truck, which would stick out of a parking lane, and no bicycle."""
    if not blueprint.has_attribute("base_type"):
        return False
    return str(blueprint.get_attribute("base_type").as_str()) == "car"
