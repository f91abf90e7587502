"""What a buffer is built with: checked once, and written to and read from a state's config."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from ..scalars import as_float, as_int
from .observation import (
    ColumnSpec,
    KeySpec,
    Shape,
    ShapeAndType,
    as_name,
    as_shape,
    key_specs,
    numpy_dtype,
    shape_and_dtype,
)
from .samplers import Prioritized, Recent, Sampler, Uniform, as_sampler

_ARGUMENTS_OF_ADD = {"obs", "action", "reward", "next_obs", "terminated", "truncated", "env_ids", "self"}
_BY_KEY = ("obs_shape", "obs_dtype", "frame_stack", "channels_last")
_SAMPLERS = {kind.__name__: kind for kind in (Uniform, Recent, Prioritized)}


@dataclass(frozen=True)
class Options:
    """The constructor's arguments, except the seed and where the buffer lies."""

    capacity: int
    num_envs: int
    n_step: int
    gamma: float
    sampler: Uniform | Recent | Prioritized
    keys: tuple[KeySpec, ...]
    """One per observation."""
    single: bool
    """Observations are plain arrays, not dicts."""
    columns: tuple[ColumnSpec, ...]
    """The action, then the extras."""
    on_jump: Literal["error", "cut"]

    @classmethod
    def checked(
        cls,
        *,
        capacity: int,
        num_envs: int,
        n_step: int,
        gamma: float,
        sampler: Sampler,
        obs_shape: Sequence[int] | Mapping[str, Sequence[int]],
        obs_dtype: torch.dtype | Mapping[str, torch.dtype] | None,
        frame_stack: int | Mapping[str, int],
        channels_last: bool | Mapping[str, bool],
        action_shape: Sequence[int],
        action_dtype: torch.dtype,
        extras: Mapping[str, ShapeAndType] | None,
        on_jump: Literal["error", "cut"],
    ) -> "Options":
        """Raises TypeError or ValueError, naming the argument, where one cannot be used."""
        capacity, num_envs = as_int(capacity, "capacity"), as_int(num_envs, "num_envs")
        n_step, gamma = as_int(n_step, "n_step"), as_float(gamma, "gamma")
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}: it must be at least 1")
        if capacity < num_envs:
            raise ValueError(f"capacity is {capacity}: it must be at least num_envs = {num_envs}")
        if not 1 <= n_step <= capacity // num_envs:
            raise ValueError(
                f"n_step is {n_step}: it must lie between 1 and the {capacity // num_envs} transitions "
                "that the buffer stores per environment"
            )
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"gamma is {gamma}: it must lie in [0, 1]")
        if on_jump not in ("error", "cut"):
            raise ValueError(f"on_jump is {on_jump!r}: it must be 'error' or 'cut'")
        columns = [_column("action", as_shape(action_shape, "action_shape"), action_dtype, "action_dtype")]
        for name, spec in (extras or {}).items():
            what = f"extras[{as_name(name, 'extras')!r}]"
            columns.append(_column(name, *shape_and_dtype(spec, what), f"dtype of {what}"))
        if taken := (extras or {}).keys() & _ARGUMENTS_OF_ADD:
            raise ValueError(f"extras has {sorted(taken)}: add() has arguments of that name, choose others")
        return cls(
            capacity=capacity,
            num_envs=num_envs,
            n_step=n_step,
            gamma=gamma,
            sampler=as_sampler(sampler),
            keys=tuple(key_specs(obs_shape, obs_dtype, frame_stack, channels_last)),
            single=not isinstance(obs_shape, Mapping),
            columns=tuple(columns),
            on_jump=on_jump,
        )

    def config(self) -> dict[str, Any]:
        """As JSON values."""
        action, *extras = self.columns
        return {
            "capacity": self.capacity,
            "num_envs": self.num_envs,
            "single": self.single,
            "obs_shape": {key.name: list(key.shape) for key in self.keys},
            "obs_dtype": {key.name: _name(key.dtype) for key in self.keys},
            "frame_stack": {key.name: key.stack for key in self.keys},
            "channels_last": {key.name: key.channels_last for key in self.keys},
            "action_shape": list(action.shape),
            "action_dtype": _name(action.dtype),
            "extras": {extra.name: [list(extra.shape), _name(extra.dtype)] for extra in extras},
            "on_jump": self.on_jump,
            "n_step": self.n_step,
            "gamma": self.gamma,
            "sampler": {"kind": type(self.sampler).__name__, **asdict(self.sampler)},
        }


def constructor_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ReplayBuffer(...) from which `config` was made."""
    arguments = dict(config)
    sampler = dict(config["sampler"])
    arguments["sampler"] = _SAMPLERS[sampler.pop("kind")](**sampler)
    arguments["obs_dtype"] = {key: getattr(torch, name) for key, name in config["obs_dtype"].items()}
    arguments["action_dtype"] = getattr(torch, config["action_dtype"])
    arguments["extras"] = {
        name: (shape, getattr(torch, dtype)) for name, (shape, dtype) in config["extras"].items()
    }
    if arguments.pop("single"):
        arguments |= {option: arguments[option]["obs"] for option in _BY_KEY}
    return arguments


def _column(name: str, shape: Shape, dtype: torch.dtype, declared_by: str) -> ColumnSpec:
    what = declared_by if name == "action" else f"the {declared_by}"
    return ColumnSpec(name, shape, dtype, numpy_dtype(dtype, what), declared_by)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
