"""A CARLA server without CARLA: the part of the client's API that covr_fast uses, over a very simple world.

Maps, places, controls and settings are the client's own objects; what would need a server is here. The
classes have the names, methods and arguments of the real ones (`test_carla_contract.py` compares them). Like
these,

- `Client(...)` itself never fails, and a call that gets no answer raises RuntimeError("time-out of ...");
- an actor's place is (0, 0, 0) until the first frame after it was spawned, and teleports take a frame;
- sensors are called from another thread, about collisions before the picture of their frame.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from carla_maps import carla, the_map

if TYPE_CHECKING:
    from carla import (
        Location,
        Map,
        Transform,
        Vector3D,
        VehicleControl,
        WalkerControl,
        WeatherParameters,
        WorldSettings,
    )

VERSION = "0.9.16"
SPEED_LIMIT = 30 / 3.6
REACH = 2.0
"""Metres between the middles of two actors that touch."""


@dataclass
class Running:
    """A server process."""

    version: str = VERSION
    maps: tuple[str, ...] = ("Town01", "Town04", "Town10HD_Opt")
    dies_at: int | None = None
    """The frame that is never finished."""
    world: World | None = None
    traffic_ports: list[int] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    alive: bool = True


SERVERS: dict[tuple[str, int], Running] = {}
"""The servers that run, by host and port."""


class Client:
    def __init__(self, host: str = "127.0.0.1", port: int = 2000, worker_threads: int = 0) -> None:
        self._address = (host, port)
        self._timeout = 0.0

    def _server(self) -> Running:
        server = SERVERS.get(self._address)
        if server is None or not server.alive:
            raise no_answer(self._timeout, ":".join(map(str, self._address)))
        return server

    def set_timeout(self, seconds: float) -> None:
        self._timeout = seconds

    def get_client_version(self) -> str:
        return VERSION

    def get_server_version(self) -> str:
        return self._server().version

    def get_available_maps(self) -> list:
        return [f"/Game/Carla/Maps/{name}" for name in self._server().maps]

    def load_world(self, map_name: str, reset_settings: bool = True, map_layers: Any = None) -> World:
        server = self._server()
        server.world = World(server, map_name)
        return server.world

    def get_trafficmanager(self, port: int = 8000) -> TrafficManager:
        self._server().traffic_ports.append(port)
        return TrafficManager(self._server())

    def apply_batch_sync(self, commands: Any, do_tick: bool = False) -> list:
        actors = self._server().world._actors
        for command in commands:
            assert isinstance(command, carla.command.DestroyActor)
            actors.pop(command.actor_id)._alive = False
        return []


def no_answer(seconds: float, address: str) -> RuntimeError:
    """The client's error, word for word (carla 0.9.16)."""
    return RuntimeError(
        f"time-out of {seconds * 1000:.0f}ms while waiting for the simulator, make sure the simulator is "
        f"ready and connected to {address}"
    )


class TrafficManager:
    def __init__(self, server: Running) -> None:
        self._server = server
        self.synchronous = False
        server.world._traffic = self

    def get_port(self) -> int:
        return self._server.traffic_ports[-1]

    def set_synchronous_mode(self, mode_switch: bool) -> None:
        self.synchronous = mode_switch

    def set_random_device_seed(self, value: int) -> None:
        self._server.seeds.append(value)

    def vehicle_percentage_speed_difference(self, actor: Actor, percentage: float) -> None:
        actor._below_limit = percentage

    def auto_lane_change(self, actor: Actor, enable: bool) -> None:
        assert actor._autopilot

    def ignore_lights_percentage(self, actor: Actor, perc: float) -> None:
        assert actor._autopilot


class World:
    def __init__(self, server: Running, map_name: str) -> None:
        self._server = server
        self._map = the_map(map_name)
        self._settings = carla.WorldSettings()
        self._frame = 100
        self._ids = itertools.count(1)
        self._actors: dict[int, Any] = {}
        self._traffic: TrafficManager | None = None
        self._callbacks = ThreadPoolExecutor(1)
        self._weather: Any = None

    def _check(self) -> None:
        if not self._server.alive:
            raise no_answer(10, "localhost:2000")

    def get_map(self) -> Map:
        return self._map

    def get_settings(self) -> WorldSettings:
        return carla.WorldSettings(
            synchronous_mode=self._settings.synchronous_mode,
            fixed_delta_seconds=self._settings.fixed_delta_seconds or 0.0,
        )

    def apply_settings(self, settings: WorldSettings, seconds: float = 0.0) -> int:
        self._check()
        self._settings = settings
        return self._frame

    def set_weather(self, arg2: WeatherParameters) -> None:
        self._weather = arg2

    def get_blueprint_library(self) -> BlueprintLibrary:
        return BlueprintLibrary(
            [
                ActorBlueprint("vehicle.tesla.model3", {"base_type": "car", "role_name": ""}),
                ActorBlueprint("vehicle.audi.a2", {"base_type": "car"}),
                ActorBlueprint("vehicle.carlamotors.firetruck", {"base_type": "truck"}),
                ActorBlueprint("vehicle.bh.crossbike", {}),
                ActorBlueprint("walker.pedestrian.0001", {}),
                ActorBlueprint("walker.pedestrian.0002", {}),
                ActorBlueprint(
                    "sensor.camera.rgb", {"image_size_x": "800", "image_size_y": "600", "fov": "90"}
                ),
                ActorBlueprint("sensor.other.collision", {}),
            ]
        )

    def spawn_actor(
        self,
        blueprint: ActorBlueprint,
        transform: Transform,
        attach_to: Any = None,
        attachment_type: Any = None,
        bone: str = "",
    ) -> Actor:
        self._check()
        blocked = any(near(a._state, transform) for a in self._actors.values() if not isinstance(a, Sensor))
        if blocked and attach_to is None:
            raise RuntimeError("Spawn failed because of collision at spawn position")
        kind = {"vehicle": Vehicle, "walker": Walker, "sensor": Sensor}[blueprint.id.split(".")[0]]
        actor = kind(self, next(self._ids), blueprint, transform, attach_to)
        self._actors[actor.id] = actor
        return actor

    def try_spawn_actor(
        self,
        blueprint: ActorBlueprint,
        transform: Transform,
        attach_to: Any = None,
        attachment_type: Any = None,
        bone: str = "",
    ) -> Actor:
        try:
            return self.spawn_actor(blueprint, transform, attach_to, attachment_type, bone)
        except RuntimeError as error:
            if "Spawn failed" not in str(error):
                raise
            return None

    def tick(self, seconds: float = 0.0) -> int:
        assert self._settings.synchronous_mode
        assert self._traffic is not None
        assert self._traffic.synchronous
        self._frame += 1
        if self._frame == self._server.dies_at:
            self._server.alive = False
        self._check()
        for actor in self._actors.values():
            actor._advance(self._settings.fixed_delta_seconds)
        bodies = [a for a in self._actors.values() if not isinstance(a, Sensor)]
        for sensor in [a for a in self._actors.values() if isinstance(a, Sensor) and a._callback]:
            others = [a for a in bodies if a is not sensor._parent]
            for data in sensor._measure(self._frame, others):
                self._callbacks.submit(sensor._callback, data)
        return self._frame


def near(one: Any, other: Any, reach: float = REACH) -> bool:
    gap = one.location - other.location
    return (gap.x**2 + gap.y**2) ** 0.5 < reach


class BlueprintLibrary:
    def __init__(self, blueprints: list[ActorBlueprint]) -> None:
        self._blueprints = blueprints

    def filter(self, wildcard_pattern: str) -> BlueprintLibrary:
        return BlueprintLibrary([b for b in self._blueprints if fnmatch.fnmatch(b.id, wildcard_pattern)])

    def find(self, id: str) -> ActorBlueprint:
        return next(b for b in self._blueprints if b.id == id)

    def __iter__(self) -> Iterator[ActorBlueprint]:
        return iter(self._blueprints)


class ActorBlueprint:
    def __init__(self, id: str, attributes: dict[str, str]) -> None:
        self._id = id
        self._attributes = attributes

    @property
    def id(self) -> str:
        return self._id

    def has_attribute(self, arg2: str) -> bool:
        return arg2 in self._attributes

    def get_attribute(self, arg2: str) -> ActorAttribute:
        return ActorAttribute(self._attributes[arg2])

    def set_attribute(self, arg2: str, arg3: str) -> None:
        assert arg2 in self._attributes
        assert isinstance(arg3, str)
        self._attributes[arg2] = arg3


class ActorAttribute:
    def __init__(self, value: str) -> None:
        self._value = value

    def as_str(self) -> str:
        return self._value


class Actor:
    def __init__(self, world: World, id: int, blueprint: ActorBlueprint, place: Any, parent: Any) -> None:
        self._world = world
        self._id = id
        self._blueprint = blueprint
        self._parent = parent
        self._state = place
        self._seen = carla.Transform()
        self._velocity = carla.Vector3D()
        self._alive = True
        self._control: Any = None

    @property
    def id(self) -> int:
        return self._id

    @property
    def is_alive(self) -> bool:
        return self._alive

    def get_transform(self) -> Transform:
        return self._seen

    def get_location(self) -> Location:
        return self._seen.location

    def get_velocity(self) -> Vector3D:
        return self._velocity

    def set_transform(self, transform: Transform) -> None:
        self._state = transform

    def set_target_velocity(self, velocity: Vector3D) -> None:
        self._velocity = velocity

    def set_target_angular_velocity(self, angular_velocity: Vector3D) -> None:
        assert angular_velocity.length() == 0

    def destroy(self) -> bool:
        self._world._check()
        self._alive = False
        return self._world._actors.pop(self._id, None) is not None

    def _move(self, velocity: Any, seconds: float) -> None:
        self._velocity = velocity
        self._state = carla.Transform(self._state.location + velocity * seconds, self._state.rotation)


class Vehicle(Actor):
    _autopilot = False
    _below_limit = 30.0

    def apply_control(self, control: VehicleControl) -> None:
        self._world._check()
        self._control = control

    def set_autopilot(self, enabled: bool = True, tm_port: int = 8000) -> None:
        assert tm_port in self._world._server.traffic_ports
        self._autopilot = enabled

    def _advance(self, seconds: float) -> None:
        """A car that accelerates with up to 6 m/s^2, brakes with up to 8, and turns as it is steered."""
        speed = self._velocity.length()
        if self._autopilot:
            speed = SPEED_LIMIT * (1 - self._below_limit / 100)
        elif self._control is not None:
            gained = (6 * self._control.throttle - 8 * self._control.brake) * seconds
            speed = 0.0 if self._control.hand_brake else max(0.0, speed + gained)
            rotation = self._state.rotation
            turned = carla.Rotation(yaw=rotation.yaw + 4 * self._control.steer * speed * seconds)
            self._state = carla.Transform(self._state.location, turned)
        self._move(self._state.get_forward_vector() * speed, seconds)
        self._seen = self._state


class Walker(Actor):
    def apply_control(self, control: WalkerControl) -> None:
        self._world._check()
        self._control = control

    def _advance(self, seconds: float) -> None:
        if self._control is not None:
            self._move(self._control.direction * self._control.speed, seconds)
        self._seen = self._state


class Sensor(Actor):
    _callback: Callable[[Any], None] | None = None

    def listen(self, callback: object) -> None:
        self._callback = callback

    def stop(self) -> None:
        self._world._check()
        self._callback = None

    def _advance(self, seconds: float) -> None:
        self._seen = self._parent._state

    def _measure(self, frame: int, others: list[Actor]) -> list[Any]:
        if self._blueprint.id == "sensor.camera.rgb":
            return [self._picture(frame, others)]
        ego = self._parent
        hit = [other for other in others if near(ego._state, other._state)]
        impulse = 100 * ego._velocity
        if hit:
            ego._velocity = carla.Vector3D()
        return [SimpleNamespace(frame=frame, normal_impulse=impulse, other_actor=other) for other in hit]

    def _picture(self, frame: int, others: list[Actor]) -> Any:
        """BGRA: blue is the frame's number, green grows from left to right, red shows who is ahead."""
        height, width = (int(self._blueprint._attributes[f"image_size_{axis}"]) for axis in "yx")
        pixels = np.zeros((height, width, 4), np.uint8)
        pixels[..., 0] = frame % 256
        pixels[..., 1] = np.linspace(0, 255, width)
        pixels[..., 3] = 255
        place = self._parent._state
        for other in others:
            gap = other._state.location - place.location
            ahead, right = gap.dot(place.get_forward_vector()), gap.dot(place.get_right_vector())
            if 0 < abs(right) / max(ahead, 1e-6) < 0.5:
                column = int(width * (0.5 + right / ahead))
                pixels[:, max(0, column - 2) : column + 2, 2] = 255
        return SimpleNamespace(frame=frame, height=height, width=width, raw_data=memoryview(pixels.tobytes()))
