"""What our car sees and feels. CARLA calls sensors' callbacks from threads of its own."""

import queue
from typing import TYPE_CHECKING

import numpy as np

from .connection import ANSWER_SECONDS, import_carla

if TYPE_CHECKING:
    import carla

FIELD_OF_VIEW = 60
"""Degrees (DBC, DMR)."""
PLACE = (1.0, 0.0, 1.5)
"""Metres ahead of the car's middle, to its right, and above the ground: at the front of the roof (DMR)."""


class Camera:
    """The car's camera, which looks ahead."""

    def __init__(self, world: "carla.World", car: "carla.Actor", height: int, width: int) -> None:
        carla = import_carla()
        blueprint = world.get_blueprint_library().find("sensor.camera.rgb")
        for name, value in {"image_size_x": width, "image_size_y": height, "fov": FIELD_OF_VIEW}.items():
            blueprint.set_attribute(name, str(value))
        self.actor = world.spawn_actor(blueprint, carla.Transform(carla.Location(*PLACE)), attach_to=car)
        self._images: queue.SimpleQueue[tuple[int, np.ndarray]] = queue.SimpleQueue()
        self.actor.listen(lambda image: self._images.put((image.frame, _rgb(image))))

    def picture(self, frame: int) -> np.ndarray:
        """uint8[H, W, 3], the picture of a frame that was simulated.

        Raises:
            RuntimeError: the server sends none.
        """
        taken = -1
        while taken < frame:
            try:
                taken, picture = self._images.get(timeout=ANSWER_SECONDS)
            except queue.Empty:
                raise RuntimeError(f"no picture of frame {frame} within {ANSWER_SECONDS:g} seconds") from None
        if taken > frame:
            raise RuntimeError(f"the picture of frame {frame} was left out")
        return picture


def _rgb(image: "carla.Image") -> np.ndarray:
    """A copy of an image, uint8[H, W, 3]: its own memory, BGRA, is reused after the callback."""
    pixels = np.frombuffer(image.raw_data, np.uint8).reshape(image.height, image.width, 4)
    return pixels[:, :, 2::-1].copy()


class CollisionSensor:
    """What the car hits."""

    def __init__(self, world: "carla.World", car: "carla.Actor") -> None:
        carla = import_carla()
        blueprint = world.get_blueprint_library().find("sensor.other.collision")
        self.actor = world.spawn_actor(blueprint, carla.Transform(), attach_to=car)
        self._impulses: queue.SimpleQueue[float] = queue.SimpleQueue()
        self.actor.listen(lambda event: self._impulses.put(float(event.normal_impulse.length())))

    def impulse(self) -> float:
        """The impulse of all collisions since the last call, in N s. One that is reported after its frame's
        picture counts for the next frame."""
        total = 0.0
        while True:
            try:
                total += self._impulses.get_nowait()
            except queue.Empty:
                return total
