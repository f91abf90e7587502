"""Environments of a user: where they come from, and the words for them.

One comes from `GymEnv(make=...)`, from `env.entry_point`, or from `register_task`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .entry_point import load
from .errors import UserError
from .gymnasium_simulator import Make, Spaces, spaces_of
from .words import Words

if TYPE_CHECKING:
    from .env_config import EnvConfig


@dataclass(frozen=True)
class Own:
    """An environment of a user."""

    make: Make
    who: str
    """Which argument gave it, for the beginning of error messages."""
    prompt: str | None = None
    action_names: tuple[str, ...] | None = None


REGISTERED: dict[str, Own] = {}
"""By env.id, environments that only this process knows."""
_SPACES: dict[int, tuple[Make, Spaces]] = {}
"""By the identity of `make`, which is kept so that no other gets it."""


def own_of(config: "EnvConfig") -> Own | None:
    """The user's environment that these settings name, or None if they name another one.

    Raises:
        UserError: env.entry_point names nothing that can be called.
    """
    make: Make | None = getattr(config, "make", None)
    if make is not None:
        own = Own(make, "GymEnv: make()")
    elif config.entry_point is not None:
        own = Own(load(config.entry_point), f"env.entry_point={config.entry_point!r}")
    elif config.id in REGISTERED:
        own = REGISTERED[config.id]
    else:
        return None
    prompt, names = config.prompt or own.prompt, config.action_names or own.action_names
    return replace(own, prompt=prompt, action_names=names)


def looked_at(own: Own) -> Spaces:
    """Its spaces, for which one environment is made the first time.

    Raises:
        UserError: it cannot be used; see `gymnasium_simulator.spaces_of`.
    """
    if id(own.make) not in _SPACES:
        _SPACES[id(own.make)] = own.make, spaces_of(own.make, own.who)
    return _SPACES[id(own.make)][1]


def words_of(own: Own, name: str) -> Words:
    """What the VLM is told, and the numbers' names: those of the settings, else of the environment's
    metadata, else neutral ones.

    Raises:
        UserError: there is not one name for each number of an action.
    """
    spaces = looked_at(own)
    count = len(spaces.low)
    prompt = own.prompt or spaces.metadata.get("prompt") or (
        f"You control what moves in the picture. The task is {name.rpartition(':')[2]}. Number i drives "
        "control i: -1 and 1 are its limits."
    )  # fmt: skip
    names = own.action_names or spaces.metadata.get("action_names")
    names = [f"number {i + 1}" for i in range(count)] if names is None else names
    checked = checked_names(names, "action_names")
    if len(checked) != count:
        raise UserError(
            f"{own.who}: {len(checked)} action_names for {count} numbers in an action: give one name per "
            "number"
        )
    if not isinstance(prompt, str):
        raise UserError(f"{own.who}: the prompt {prompt!r} in its metadata must be text")
    return Words(prompt.strip(), checked)


def checked_names(names: Any, argument: str) -> tuple[str, ...]:
    """A sequence of texts as a tuple, or a UserError that names the argument."""
    texts = isinstance(names, Sequence) and not isinstance(names, str)
    if not (texts and all(isinstance(each, str) for each in names)):
        raise UserError(f"{argument}={names!r} must be a sequence of texts")
    return tuple(names)


def keep(make: Make, module: str) -> str:
    """The env.id under which this process finds `make` again, though another cannot."""
    name = getattr(make, "__qualname__", type(make).__qualname__).rpartition(".")[2]
    base = f"{module.rpartition('.')[2]}:{name}"
    number = 1
    while (known := REGISTERED.get(base if number == 1 else f"{base}-{number}")) and known.make is not make:
        number += 1
    kept = base if number == 1 else f"{base}-{number}"
    REGISTERED[kept] = Own(make, "GymEnv: make()")
    return kept


def doubts(config: "EnvConfig") -> list[str]:
    """A warning if no other process finds the environment of a run."""
    if config.entry_point is not None or config.id not in REGISTERED:
        return []
    return [
        f"another process finds the environment {config.id!r} only if it calls register_task({config.id!r}, "
        "...) before it resumes or evaluates this run; a function at the top of a module needs no such call"
    ]
