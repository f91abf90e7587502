"""What a buffer is built with: checked once, and written to and read from a state's config."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from ..scalars import as_float, as_int
from .observation import ColumnSpec, KeySpec
from .samplers import SAMPLERS, SamplerSpec

_BY_KEY = ("obs_shape", "obs_dtype", "frame_stack", "channels_last")


@dataclass(frozen=True)
class Options:
    """The constructor's arguments, except the seed and where the buffer lies.

    Raises:
        TypeError, ValueError: an argument that cannot be used, which the message names.
    """

    capacity: int
    num_envs: int
    n_step: int
    gamma: float
    sampler: SamplerSpec
    on_jump: Literal["error", "cut"]
    keys: list[KeySpec]
    """One per observation."""
    single: bool
    """Observations are plain arrays, not dicts."""
    action: ColumnSpec
    extras: dict[str, ColumnSpec]

    def __post_init__(self) -> None:
        for name in ("capacity", "num_envs", "n_step"):
            object.__setattr__(self, name, as_int(getattr(self, name), name))
        object.__setattr__(self, "gamma", as_float(self.gamma, "gamma"))
        if self.num_envs < 1:
            raise ValueError(f"num_envs is {self.num_envs}: it must be at least 1")
        if self.capacity < self.num_envs:
            raise ValueError(f"capacity is {self.capacity}: it must be at least num_envs = {self.num_envs}")
        if not 1 <= self.n_step <= self.capacity // self.num_envs:
            raise ValueError(
                f"n_step is {self.n_step}: it must lie between 1 and the {self.capacity // self.num_envs} "
                "transitions that the buffer stores per environment"
            )
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"gamma is {self.gamma}: it must lie in [0, 1]")
        if self.on_jump not in ("error", "cut"):
            raise ValueError(f"on_jump is {self.on_jump!r}: it must be 'error' or 'cut'")

    @property
    def columns(self) -> list[ColumnSpec]:
        return [self.action, *self.extras.values()]

    def config(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "capacity": self.capacity,
            "num_envs": self.num_envs,
            "single": self.single,
            "obs_shape": {key.name: list(key.shape) for key in self.keys},
            "obs_dtype": {key.name: _name(key.dtype) for key in self.keys},
            "frame_stack": {key.name: key.stack for key in self.keys},
            "channels_last": {key.name: key.channels_last for key in self.keys},
            "action_shape": list(self.action.shape),
            "action_dtype": _name(self.action.dtype),
            "extras": {name: [list(extra.shape), _name(extra.dtype)] for name, extra in self.extras.items()},
            "on_jump": self.on_jump,
            "n_step": self.n_step,
            "gamma": self.gamma,
            "sampler": {"kind": type(self.sampler).__name__, **asdict(self.sampler)},
        }


def constructor_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ReplayBuffer(...) from which `config` was made."""
    arguments = dict(config)
    sampler = dict(config["sampler"])
    arguments["sampler"] = SAMPLERS[sampler.pop("kind").lower()](**sampler)
    arguments["obs_dtype"] = {key: getattr(torch, name) for key, name in config["obs_dtype"].items()}
    arguments["action_dtype"] = getattr(torch, config["action_dtype"])
    arguments["extras"] = {
        name: (shape, getattr(torch, dtype)) for name, (shape, dtype) in config["extras"].items()
    }
    if arguments.pop("single"):
        arguments |= {option: arguments[option]["obs"] for option in _BY_KEY}
    return arguments


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
