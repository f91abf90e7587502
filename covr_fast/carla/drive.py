"""One environment: our car in one scenario on one server."""

from contextlib import suppress
from typing import Any

import numpy as np

from .actors import Others
from .connection import SECONDS, Server, import_carla
from .ending import CUT_OFF, Ending
from .lanes import heading, lane_under
from .reward import reward
from .scene import Scenario
from .sensors import Camera, CollisionSensor

CAR = "vehicle.tesla.model3"
"""Ours (DMR)."""
SETTLING = 5
"""Frames before an episode in which everything comes to stand on the ground (DMR)."""


class Drive:
    """Episodes one after the other. Our car and its sensors stay for all of them; the others are spawned
    anew.

    All methods but `close` raise a UserError if the server fails, or its map is not the expected one.
    """

    def __init__(
        self, server: Server, scenario: Scenario, *, seed: int, max_frames: int, height: int, width: int
    ) -> None:
        """Spawns our car. Takes over the server: `close` closes it."""
        self._server = server
        self._scenario = scenario
        self._rng = np.random.default_rng(seed)
        self._max_frames = max_frames
        self._sensors: list[Any] = []
        self._car: Any = None
        try:
            with server.answering():
                self._others = Others(server, self._rng)
                self._car = self._spawn_car()
                camera = Camera(server.world, self._car, height, width)
                self._sensors.append(camera.actor)
                collisions = CollisionSensor(server.world, self._car)
                self._sensors.append(collisions.actor)
            self._camera, self._collisions = camera, collisions
        except BaseException:
            self.close()
            raise

    def reset(self) -> np.ndarray:
        """Begins an episode; returns its first picture, uint8[H, W, 3]."""
        carla, car = import_carla(), self._car
        with self._server.answering():
            scene = self._scenario.draw(self._server.map, self._rng)
            self._others.destroy()
            car.set_transform(scene.ego)
            car.set_target_velocity(carla.Vector3D())
            car.set_target_angular_velocity(carla.Vector3D())
            car.apply_control(carla.VehicleControl(brake=1.0))
            self._server.tick()  # only now the car is away from where it was
            self._others.spawn(scene)
            for _ in range(SETTLING):
                frame = self._server.tick()
            picture = self._camera.picture(frame)
        self._collisions.impulse()  # what happened before the episode is not its fault
        self._ending = Ending(self._max_frames, self._scenario.road)
        return picture

    def step(self, steer: float, pedal: float) -> tuple[np.ndarray, float, bool, bool]:
        """Simulates one frame.

        Args:
            steer: -1 is fully left, 1 fully right.
            pedal: -1 is full brake, 1 full throttle.

        Returns:
            The picture after it, uint8[H, W, 3], the reward, and whether the episode was terminated, or
            truncated.
        """
        throttle, brake = max(pedal, 0.0), max(-pedal, 0.0)
        control = import_carla().VehicleControl(throttle=throttle, steer=steer, brake=brake)
        with self._server.answering():
            self._car.apply_control(control)
            self._others.move(self._car.get_transform())
            picture = self._camera.picture(self._server.tick())
            velocity = self._car.get_velocity()
            lane = lane_under(self._server.map, self._car.get_location())
        ahead, impulse = heading(lane), self._collisions.impulse()
        gained = reward(velocity, ahead, seconds=SECONDS, impulse=impulse, steer=steer, brake=brake)
        end = self._ending.after(lane, ahead, speed=velocity.length(), impulse=impulse)
        return picture, gained, end is not None and end not in CUT_OFF, end in CUT_OFF

    def close(self) -> None:
        """Destroys our car, its sensors and the others, and gives the server back."""
        if not self._server.lost:
            with suppress(RuntimeError):  # it died after its last answer, and took them with it
                self._destroy()
        self._server.close()

    def _destroy(self) -> None:
        for sensor in self._sensors:
            sensor.stop()
            sensor.destroy()
        self._sensors.clear()
        if self._car is not None:
            self._others.destroy()
            self._car.destroy()
            self._car = None

    def _spawn_car(self) -> Any:
        blueprint = self._server.world.get_blueprint_library().find(CAR)
        blueprint.set_attribute("role_name", "hero")
        place = self._scenario.draw(self._server.map, self._rng).ego
        return self._server.world.spawn_actor(blueprint, place)
