"""What a buffer is built with: checked once, and written to and read from a state's config."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from ..scalars import as_float, as_int
from .samplers import SAMPLERS, SamplerSpec

Shape = tuple[int, ...]
ShapeAndType = Shape | tuple[Sequence[int], torch.dtype]

_BY_KEY = ("obs_shape", "obs_dtype", "frame_stack", "channels_last")
_ARGUMENTS_OF_ADD = {"obs", "action", "reward", "next_obs", "terminated", "truncated", "env_ids", "self"}


@dataclass(frozen=True)
class KeySpec:
    """One observation key: `stack` frames of [channels, height, width].

    A grey image [height, width] has one channel. Anything else that is not an image has height = width = 1.
    """

    name: str
    shape: Shape
    """Of the stacked observation, as it is added."""
    dtype: torch.dtype
    numpy_dtype: np.dtype
    stack: int
    """How many frames it stacks."""
    channels: int
    """Of one frame."""
    height: int
    width: int
    channels_last: bool
    """It is added as [height, width, channels]."""
    declared_by: ClassVar[str] = "obs_dtype"
    infinite: ClassVar[bool] = False

    @property
    def is_image(self) -> bool:
        return self.dtype == torch.uint8 and (len(self.shape) == 3 or _is_grey(self.shape, self.stack))

    @property
    def frame_bytes(self) -> int:
        return self.channels * self.height * self.width * self.dtype.itemsize

    @property
    def frame_shape(self) -> Shape:
        """Shape of one stored frame: channels first, or the plain vector."""
        if len(self.shape) == 3:
            return self.channels, self.height, self.width
        return (self.shape[0] // self.stack, *self.shape[1:]) if self.shape else ()

    def out_shape(self, border: int = 0) -> Shape:
        """Shape of a sampled observation with `border` pixels more at every edge, or fewer if it is negative.
        Images are channels first."""
        size = self.height + 2 * border, self.width + 2 * border
        if len(self.shape) == 3:
            return (self.stack * self.channels, *size)
        return size if self.is_image else self.shape


@dataclass(frozen=True)
class ColumnSpec:
    """One value per transition: the action or an extra."""

    name: str
    shape: Shape
    dtype: torch.dtype
    numpy_dtype: np.dtype
    declared_by: str
    """The constructor's argument that says the dtype, for errors; "" where none does."""
    infinite: bool = False
    """Infinite values are allowed."""


Spec = KeySpec | ColumnSpec


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


def key_specs(
    obs_shape: Sequence[int] | Mapping[str, Sequence[int]],
    obs_dtype: torch.dtype | Mapping[str, torch.dtype] | None,
    frame_stack: int | Mapping[str, int],
    channels_last: bool | Mapping[str, bool],
) -> list[KeySpec]:
    """The keys of an observation. In a dict, an integer frame_stack is for the images only."""
    options = {"obs_dtype": obs_dtype, "frame_stack": frame_stack, "channels_last": channels_last}
    by_key = {option: given for option, given in options.items() if isinstance(given, Mapping)}
    single = not isinstance(obs_shape, Mapping)
    if single and by_key:
        raise TypeError("obs_dtype, frame_stack and channels_last can be dicts only if obs_shape is one")
    shapes = obs_shape if isinstance(obs_shape, Mapping) else {"obs": obs_shape}
    if not shapes:
        raise ValueError("obs_shape is an empty dict: a buffer needs at least one observation key")
    for option, given in by_key.items():
        if unknown := given.keys() - shapes.keys():
            raise ValueError(f"{option} names {sorted(unknown)}, obs_shape has the keys {sorted(shapes)}")
    specs = []
    for name, shape in shapes.items():
        dtype = obs_dtype.get(name) if isinstance(obs_dtype, Mapping) else obs_dtype
        if isinstance(frame_stack, Mapping):
            stack = frame_stack.get(name, 1)
        else:
            stack = frame_stack if single or len(shape) == 3 else 1
        last = channels_last.get(name, False) if isinstance(channels_last, Mapping) else channels_last
        specs.append(_key_spec(name, shape, dtype, stack, last))
    return specs


def _key_spec(
    name: str, shape: Sequence[int], dtype: torch.dtype | None, stack: int, channels_last: bool
) -> KeySpec:
    """Splits a stacked shape into frames; says how to fix one that cannot be split."""
    _check_name(name, "obs_shape")
    shape, stack = _as_shape(shape, f"obs_shape of {name!r}"), as_int(stack, "frame_stack")
    if any(n < 1 for n in shape):
        raise ValueError(f"obs_shape of {name!r} is {shape}: every size must be at least 1")
    if not 1 <= stack <= 64:
        raise ValueError(f"frame_stack is {stack}: it must lie between 1 and 64")
    if dtype is None and len(shape) > 3:
        # gymnasium's FrameStackObservation gives [stack, H, W, C]. As float32, it would take four times the
        # memory.
        raise ValueError(
            f"obs_shape of {name!r} is {shape}: images have three dimensions, frames stacked along the "
            "channels as by np.concatenate; to store something else as it is, give its obs_dtype"
        )
    if dtype is None:
        dtype = torch.uint8 if len(shape) == 3 or _is_grey(shape, stack) else torch.float32
    found = _numpy_dtype(dtype, f"obs_dtype of {name!r}")
    channels_last = bool(channels_last) and len(shape) == 3
    stacked = shape[-1 if channels_last else 0] if shape else 1
    if stacked % stack:
        where = "last" if channels_last else "first"
        raise ValueError(
            f"obs_shape of {name!r} is {shape}: its {where} dimension is not a multiple of "
            f"frame_stack={stack}. obs_shape is the stacked shape, e.g. (9, 84, 84) for three RGB frames"
        )
    height, width = 1, 1
    if len(shape) == 3:
        height, width = shape[:2] if channels_last else shape[1:]
    elif dtype == torch.uint8 and _is_grey(shape, stack):
        height, width = shape
    channels = math.prod(shape) // (stack * height * width)
    return KeySpec(name, shape, dtype, found, stack, channels, height, width, channels_last)


def action_spec(shape: Sequence[int], dtype: torch.dtype) -> ColumnSpec:
    found = _numpy_dtype(dtype, "action_dtype")
    return ColumnSpec("action", _as_shape(shape, "action_shape"), dtype, found, "action_dtype")


def extra_specs(extras: Mapping[str, ShapeAndType] | None) -> dict[str, ColumnSpec]:
    """`(2,)` is a shape, `((2,), torch.int64)` a shape with its dtype, which is float32 unless given."""
    specs = {}
    for name, spec in (extras or {}).items():
        _check_name(name, "extras")
        what, sizes, dtype = f"extras[{name!r}]", spec, torch.float32
        if isinstance(spec, Sequence) and len(spec) == 2 and isinstance(spec[1], torch.dtype):
            sizes, dtype = spec  # type: ignore[assignment]
        shape, found = _as_shape(sizes, what), _numpy_dtype(dtype, f"the dtype of {what}")
        specs[name] = ColumnSpec(name, shape, dtype, found, f"dtype of {what}", infinite=True)
    if taken := specs.keys() & _ARGUMENTS_OF_ADD:
        raise ValueError(f"extras has {sorted(taken)}: add() has arguments of that name, choose others")
    return specs


def _is_grey(shape: Shape, stack: int) -> bool:
    """Whether observations of this shape are grey images. With a stack, they are stacked vectors."""
    return len(shape) == 2 and stack == 1


def _check_name(name: Any, what: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{what} has the key {name!r}: keys must be strings")


def _as_shape(sizes: Sequence[Any], what: str) -> Shape:
    try:
        if isinstance(sizes, str):
            raise TypeError
        return tuple(as_int(n, what) for n in sizes)
    except TypeError:
        raise TypeError(f"{what} is {sizes!r}: it must be a tuple of integers, such as (3,) or ()") from None


def _numpy_dtype(dtype: torch.dtype, what: str) -> np.dtype:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{what} is {dtype!r}: it must be a dtype of torch, such as torch.uint8")
    try:
        found = torch.empty(0, dtype=dtype, device="cpu").numpy().dtype
    except TypeError:
        raise ValueError(f"{what} is {dtype}, which numpy lacks: store it as torch.float32") from None
    if found.kind not in "biuf":
        raise ValueError(f"{what} is {dtype}: store booleans, integers or real numbers")
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
