"""From settings to an agent."""

import torch

from .agent import Agent
from .config import AgentConfig
from .drqv2 import DrQV2
from .guidance import Guidance
from .sac import SAC


def make_agent(
    obs_shape: tuple[int, ...],
    action_shape: tuple[int, ...],
    config: AgentConfig,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    guidance: Guidance | None = None,
) -> Agent:
    """The agent of `config.kind`; arguments and errors as for `Agent`."""
    kind = DrQV2 if config.kind in DrQV2.kinds else SAC
    return kind(obs_shape, action_shape, config, device=device, seed=seed, guidance=guidance)
