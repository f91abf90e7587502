"""Visual RL agents."""

from .agent import Agent
from .config import AgentConfig, BatchForm, Kind, agent_config
from .drqv2 import DrQV2
from .guidance import Guidance
from .make import make_agent
from .sac import SAC

__all__ = [
    "SAC", "Agent", "AgentConfig", "BatchForm", "DrQV2", "Guidance", "Kind", "agent_config", "make_agent",
]  # fmt: skip
