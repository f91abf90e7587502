"""What the filter asks about the policy whose samples D_f holds: its entropy, and values of states."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .agents import Agent
from .buffer import ReplayBuffer
from .buffer.batch import pixels
from .config import TrainConfig
from .view import agent_view, vlm_view
from .vlm import ActionPrior

_AT_ONCE = 256
"""Transitions of one call of the critic."""


class Judge(ABC):
    """Answers about stored transitions, by their ids int64[n]."""

    action_dim: int
    """Numbers of an action."""

    @abstractmethod
    def entropy(self, ids: Tensor) -> Tensor:
        """e_t of Eq. 5 on these transitions, a scalar: minus the mean log-density of the policy's actions, in
        nats."""

    def values_after(self, ids: Tensor) -> Tensor:
        """float32[n], the critic's values of the observations that followed."""
        raise TypeError("a policy without a critic gives no values")

    def q(self, ids: Tensor) -> Tensor:
        """float32[n], the critic's values of the actions that were executed."""
        raise TypeError("a policy without a critic gives no values")


class AgentJudge(Judge):
    """The agent is the policy, and its critic gives the values."""

    def __init__(self, config: TrainConfig, agent: Agent, buffer: ReplayBuffer) -> None:
        self._config = config
        self._agent = agent
        self._buffer = buffer
        self.action_dim = agent.action_dim

    def entropy(self, ids: Tensor) -> Tensor:
        return self._agent.entropy(self._view(pixels(self._buffer.observations(ids))))

    def values_after(self, ids: Tensor) -> Tensor:
        return self._agent.value(self._view(self._buffer.get(ids, n_step=1, dtype=torch.uint8).next_obs))

    def q(self, ids: Tensor) -> Tensor:
        def of(chunk: Tensor) -> Tensor:
            obs = self._view(pixels(self._buffer.observations(chunk)))
            return self._agent.value(obs, self._buffer.actions(chunk))

        return torch.cat([of(chunk) for chunk in ids.split(_AT_ONCE)])

    def _view(self, obs: Tensor) -> Tensor:
        return agent_view(self._config, obs)


class VLMJudge(Judge):
    """The VLM is the policy. There is no critic: `TrainConfig.check` refuses settings that would ask one."""

    def __init__(self, config: TrainConfig, prior: ActionPrior, buffer: ReplayBuffer) -> None:
        self._config = config
        self._prior = prior
        self._buffer = buffer
        self.action_dim = prior.action_dim

    def entropy(self, ids: Tensor) -> Tensor:
        """Of its answers at temperature 1, as a density that is constant between the numbers of the grid:
        comparable with that of an agent."""
        stacks = pixels(self._buffer.observations(ids))
        sure = self._prior(vlm_view(self._config, stacks), confidence=True).confidence
        assert sure is not None
        steps = 10**self._config.vlm.decimals
        numbers = 2 * steps + 1
        return (1 - sure.mean()) * self.action_dim * math.log(numbers) - self.action_dim * math.log(steps)
