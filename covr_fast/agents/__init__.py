"""Visual RL agents."""

from .guidance import Guidance
from .sac import SAC, SACConfig

__all__ = ["SAC", "Guidance", "SACConfig"]
