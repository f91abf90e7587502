"""The settings of environments."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from .custom import checked_names, keep
from .entry_point import entry_point_of, short_name
from .errors import UserError


@dataclass
class EnvConfig:
    """Which environment, how many of them, and the form of their observations."""

    id: str = "CarRacing-v3"
    """CarRacing-v3, racetrack-v0, highway-v0, a DMControl task of EnvPool such as CheetahRun-v1,
    carla-highway, carla-pedestrians, or a name given to register_task. With entry_point it follows from
    that."""
    entry_point: str | None = None
    """An environment of your own: package.module:make or folder/file.py:make, where make is as for GymEnv."""
    prompt: str | None = None
    """For an environment of your own: what the VLM is told of it, without the format of the answer. None:
    metadata["prompt"] of the environment, else neutral words."""
    action_names: tuple[str, ...] | None = None
    """For an environment of your own: a short name for each number of an action, for people, such as
    left/right. None: metadata["action_names"] of the environment, else numbers."""
    server: str = "localhost:2000"
    """CARLA only: HOST:PORT of the first environment's server. The next ones are at PORT + 10, + 20, ..."""
    num_envs: int = 16
    """Total number of environments."""
    batch_size: int = 8
    """Environments stepped together; the other batches simulate meanwhile. Equal to num_envs: no overlap."""
    num_threads: int = 1
    """Simulator threads per batch, in EnvPool."""
    height: int = 84
    """Frame height in pixels, after resizing."""
    width: int = 84
    """Frame width in pixels, after resizing."""
    grayscale: bool = False
    """One luma channel instead of RGB."""
    frame_stack: int = 3
    """Frames stacked along the channels, oldest first."""
    action_repeat: int = 4
    """Simulator frames (environment steps) per decision; their rewards are summed."""
    max_episode_steps: int = 1000
    """Simulator frames after which an episode is truncated."""
    seed: int = 0
    """Seed of the first environment; the next ones have the next seeds. Training adds 10,000 per run seed,
    and skips the seeds of evaluations."""

    def __post_init__(self) -> None:
        if self.entry_point is not None:
            self.id = short_name(self.entry_point)
        if self.action_names is not None:
            self.action_names = checked_names(self.action_names, "env.action_names")  # JSON has no tuples

    def recorded(self) -> "EnvConfig":
        """The settings that config.json holds."""
        return self

    @property
    def channels(self) -> int:
        return 1 if self.grayscale else 3

    @property
    def obs_shape(self) -> tuple[int, int, int]:
        """Shape of a stacked observation, [frame_stack * channels, height, width]."""
        return (self.frame_stack * self.channels, self.height, self.width)


@dataclass
class GymEnv(EnvConfig):
    """A Gymnasium environment of your own: `TrainConfig(env=GymEnv(make=make, num_envs=8))`.

    A function or class at the top of a module or script is recorded in config.json (`entry_point`), and other
    processes find it there. Any other, such as a lambda, is known to this process only.
    """

    make: Callable[..., Any] = field(kw_only=True)
    """Called without arguments, makes one gymnasium.Env, a new one each time. Or, called with a number of
    environments (a parameter that has to be given, or is named num_envs), makes a gymnasium.vector.VectorEnv
    of so many: one for each batch.

    Actions are a Box of shape [A] with finite bounds, to which [-1, 1] is scaled. Frames are the observations
    if they are uint8 [H, W, 3], else what `render()` returns with render_mode="rgb_array"; they are resized.
    Environment i gets seed + i in its first reset; a vector environment is given the seed of its first one.
    It is used by one thread only."""
    id: str = field(init=False, default="")
    """Follows from the name of `make`."""
    entry_point: str | None = field(init=False, default=None)
    """Where another process finds `make`; None if it cannot."""
    action_repeat: int = 1
    """Environment steps per decision; their rewards are summed."""

    def __post_init__(self) -> None:
        if not callable(self.make):
            raise UserError(f"GymEnv: make={self.make!r} must be a function that makes one gymnasium.Env")
        self.entry_point = entry_point_of(self.make)
        if self.entry_point is None:
            self.id = keep(self.make, getattr(self.make, "__module__", None) or "own")
        super().__post_init__()

    def recorded(self) -> EnvConfig:
        return EnvConfig(**{each.name: getattr(self, each.name) for each in fields(EnvConfig)})
