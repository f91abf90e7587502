"""What a buffer must know about the agent that uses it."""

import math
import sys
from inspect import signature
from types import FrameType
from typing import Any

from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm


def n_steps_and_gamma(buffer: object, n_steps: int | None, gamma: float | None) -> tuple[int, float]:
    """The given values, else those of the agent that makes the buffer, else 1 and 0.99.

    Raises:
        ValueError: a value out of range, or one that differs from the agent's. A default value of the agent
            may differ if SB3 trains with the buffer's value: that is so for n_steps, and for gamma if
            n_steps > 1, because then samples have discounts.
    """
    if n_steps is not None and (isinstance(n_steps, bool) or int(n_steps) != n_steps or n_steps < 1):
        raise ValueError(f"n_steps is {n_steps}: it must be an integer of at least 1")
    if gamma is not None and not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma is {gamma}: it must lie in [0, 1]")
    agent = _agent_in_setup(buffer)
    if agent is None:
        return int(n_steps or 1), 0.99 if gamma is None else float(gamma)
    kind, theirs = type(agent).__name__, int(getattr(agent, "n_steps", 1))
    if n_steps is not None and theirs not in (1, n_steps):
        raise ValueError(_contradiction("n_steps", n_steps, kind, theirs))
    steps = int(n_steps or theirs)
    if gamma is None or math.isclose(gamma, agent.gamma, rel_tol=1e-6):
        return steps, float(agent.gamma)
    default = signature(type(agent)).parameters.get("gamma")
    if steps == 1 or default is None or agent.gamma != default.default:
        raise ValueError(_contradiction("gamma", gamma, kind, agent.gamma))
    return steps, float(gamma)


def _contradiction(name: str, given: float, kind: str, theirs: float) -> str:
    return f"replay_buffer_kwargs has {name}={given}, {kind} has {name}={theirs}: give it to {kind} alone"


def _agent_in_setup(buffer: object) -> OffPolicyAlgorithm | None:
    """The agent whose `_setup_model` is constructing `buffer`.

    SB3 passes n_steps and gamma only to its own buffer classes. The agent that constructs a buffer is the
    caller of its constructors, so it is found on the call stack.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and _first_argument(frame) is buffer:  # functions of this module, constructors
        frame = frame.f_back
    if frame is None or frame.f_code.co_name != "_setup_model":
        return None
    caller = _first_argument(frame)
    return caller if isinstance(caller, OffPolicyAlgorithm) else None


def _first_argument(frame: FrameType) -> Any:
    """`self` of a method."""
    names = frame.f_code.co_varnames[:1]
    return frame.f_locals.get(names[0]) if names else None
