"""covr_fast: COVR (Xia et al. 2026), fast. A visual RL agent and a VLM that teach each other.

Importing this package is cheap: every public name is loaded on first use, so the buffer and the ops never
pull in transformers or envpool.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "DrQV2": "covr_fast.agents",
    "EnvConfig": "covr_fast.env_config",
    "GymEnv": "covr_fast.env_config",
    "ReplayBuffer": "covr_fast.buffer",
    "SAC": "covr_fast.agents",
    "TrainConfig": "covr_fast.config",
    "Trainer": "covr_fast.trainer",
    "load_policy": "covr_fast.checkpoint",
    "make_env": "covr_fast.envs",
    "register_task": "covr_fast.tasks",
}
_SUBMODULES = {"ops", "vlm"}

__all__ = [
    "SAC", "DrQV2", "EnvConfig", "GymEnv", "ReplayBuffer", "TrainConfig", "Trainer", "__version__",
    "load_policy", "make_env", "ops", "register_task", "vlm",
]  # fmt: skip

if TYPE_CHECKING:
    from . import ops, vlm
    from .agents import SAC, DrQV2
    from .buffer import ReplayBuffer
    from .checkpoint import load_policy
    from .config import TrainConfig
    from .env_config import EnvConfig, GymEnv
    from .envs import make_env
    from .tasks import register_task
    from .trainer import Trainer


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
