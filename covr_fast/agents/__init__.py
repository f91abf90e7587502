"""Visual RL agents."""

from .sac import SAC, SACConfig

__all__ = ["SAC", "SACConfig"]
