"""Scripted drivers: reference rows beside what an agent learns."""

from dataclasses import replace
from types import ModuleType

from ..env_config import EnvConfig
from ..errors import UserError
from ..evaluate import Policy
from . import car_racing, highway, racetrack

_DRIVERS = {
    "CarRacing-v3": car_racing,
    "racetrack-v0": racetrack,
    "racetrack-large-v0": racetrack,
    "highway-v0": highway,
}


def driver(env_id: str) -> Policy:
    """The scripted driver of an environment. It reads the pictures of `camera`.

    Raises:
        UserError: the environment has none.
    """
    policy: Policy = _module(env_id).driver()
    return policy


def camera(env_id: str, num_envs: int, max_episode_steps: int) -> EnvConfig:
    """Environments, in one batch, that show what the driver of `env_id` reads.

    Raises:
        UserError: the environment has no driver.
    """
    pictures: EnvConfig = _module(env_id).PICTURES
    return replace(
        pictures, id=env_id, num_envs=num_envs, batch_size=num_envs, max_episode_steps=max_episode_steps
    )


def _module(env_id: str) -> ModuleType:
    if env_id not in _DRIVERS:
        raise UserError(f"env_id={env_id!r} has no scripted driver: choose {' or '.join(_DRIVERS)}")
    return _DRIVERS[env_id]
