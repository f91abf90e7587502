"""The environments of EnvPool that give pixels, and how their actions and frames map to the agent's."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import UserError, unknown
from .opengl import import_envpool

if TYPE_CHECKING:
    from .envs import EnvConfig


# The lowest 12 of CarRacing's 96 rows show instruments, which say nothing that the view above does not show.
_CAR_RACING_VIEW = 84
# EnvPool reports +-1e10 for MuJoCo's actuators without limits.
_UNBOUNDED = 1e9


@dataclass(frozen=True)
class Task:
    """How an environment's actions and frames map to the agent's."""

    action_dim: int
    to_sim: Callable[[np.ndarray], np.ndarray]
    """[n, action_dim] in [-1, 1] -> the simulator's actions."""
    to_rgb: Callable[[np.ndarray], np.ndarray] | None
    """[n, ...] simulator observation -> uint8[n, H, W, 3] newest frame. None: observations contain no frame;
    frames are rendered on request."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of EnvPool."""


def find_task(config: "EnvConfig") -> Task:
    """The task of config.id.

    Raises:
        UserError: an unknown id, or an environment that cannot be driven from pixels by bounded actions.
    """
    envpool = import_envpool()
    known = envpool.list_all_envs()
    if config.id not in known:
        raise unknown("environment env.id", config.id, known)
    if _is_car_racing(config):
        return Task(2, _car_racing_action, lambda obs: obs[:, :_CAR_RACING_VIEW])
    try:
        spec = envpool.make_spec(config.id)
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"env.id={config.id!r} cannot be built ({' '.join(str(error).split())}): "
            "choose CarRacing-v3 or a DMControl task, such as CheetahRun-v1"
        ) from error
    action = spec.action_space
    if not (hasattr(action, "low") and np.issubdtype(action.dtype, np.floating)):
        raise UserError(
            f"env.id={config.id!r} has a discrete action space: COVR's actor and its priors are continuous; "
            "choose an environment with a Box action space, such as CarRacing-v3 or CheetahRun-v1"
        )
    if not type(spec).__name__.startswith("Dmc"):
        raise UserError(
            f"env.id={config.id!r} does not give pixels for continuous actions: "
            "choose CarRacing-v3 or a DMControl task, such as CheetahRun-v1"
        )
    low, high = action.low.astype(np.float64), action.high.astype(np.float64)
    if high.max() - low.min() >= _UNBOUNDED:
        raise UserError(
            f"the actions of env.id={config.id!r} have no bounds that [-1, 1] could be scaled to: "
            "choose another DMControl task, such as CheetahRun-v1"
        )

    def to_sim(a: np.ndarray) -> np.ndarray:
        return np.asarray(low + (a + 1) * 0.5 * (high - low), np.float32)

    options = {
        "render_mode": "rgb_array",
        "render_width": config.width,
        "render_height": config.height,
        "render_camera_id": _camera(config.id),
    }
    return Task(action.shape[0], to_sim, None, options)


def action_labels(config: "EnvConfig") -> list[str]:
    """One label per dimension of the agent's action, for people: the effect of -1 and of +1."""
    if _is_car_racing(config):
        return ["left/right", "brake/gas"]
    return [f"action {i}" for i in range(find_task(config).action_dim)]


def _is_car_racing(config: "EnvConfig") -> bool:
    return config.id.startswith("CarRacing-")


def _car_racing_action(action: np.ndarray) -> np.ndarray:
    """(steering, signed gas/brake) in [-1, 1]^2 -> (steering, gas, brake)."""
    steer, pedal = action[:, 0], action[:, 1]
    return np.stack([steer, np.maximum(pedal, 0), np.maximum(-pedal, 0)], axis=1)


def _camera(env_id: str) -> int:
    """The camera of a DMControl task that gives the pixels.

    Camera 0, as in DMControl's pixel wrapper, except where it does not follow the body: the quadruped is tiny
    in it (others who learn from its pixels take camera 2 too), and in the dog's fetch task it follows the
    ball.
    """
    return 2 if env_id.startswith(("Quadruped", "DogFetch")) else 0
