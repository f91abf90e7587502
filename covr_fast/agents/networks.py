"""What acts and what judges on top of an encoder: squashed Gaussian actor, noisy actor, twin Q functions."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .encoder import MADE, orthogonal_

EDGE = 1 - 1e-6
"""Greatest action of a NoisyActor."""


def mlp(inputs: int, hidden: int, outputs: int, gain: float) -> nn.Sequential:
    """A network with two hidden layers and ReLU, its weights orthogonal with this gain."""
    net = nn.Sequential(
        nn.Linear(inputs, hidden, **MADE),
        nn.ReLU(),
        nn.Linear(hidden, hidden, **MADE),
        nn.ReLU(),
        nn.Linear(hidden, outputs, **MADE),
    )
    net.apply(lambda module: orthogonal_(module, gain))
    return net


class ActorSample(NamedTuple):
    """action [B, A] in (-1, 1), log_prob [B] of it, and mean [B, A], the squashed mean action."""

    action: Tensor
    log_prob: Tensor
    mean: Tensor


class Actor(nn.Module):
    """Squashed Gaussian policy on features [B, F], of which `trunk` makes a latent.

    Args:
        trunk: features -> latent [B, latent].
        net: latent -> mean and raw log-std [B, 2 A].
        log_std: bounds of the log-std, between which a tanh squashes the raw one.
    """

    def __init__(self, trunk: nn.Module, net: nn.Module, log_std: tuple[float, float]):
        super().__init__()
        self.trunk, self.net, self.log_std = trunk, net, log_std

    def forward(self, features: Tensor, noise: Tensor) -> ActorSample:
        """Reparameterised sample; noise [B, A] is standard normal."""
        mean, raw = self.net(self.trunk(features)).chunk(2, dim=-1)
        low, high = self.log_std
        log_std = low + 0.5 * (high - low) * (torch.tanh(raw) + 1)
        action = mean + log_std.exp() * noise
        log_prob = (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        # log(1 - tanh(x)^2), in a form that stays accurate for large |x|.
        log_prob = log_prob - (2 * (math.log(2) - action - F.softplus(-2 * action))).sum(-1)
        return ActorSample(torch.tanh(action), log_prob, torch.tanh(mean))


class NoisyActor(nn.Module):
    """Deterministic policy on features [B, F] with noise of a given size.

    Args:
        trunk: features -> latent [B, latent].
        net: latent -> mean actions [B, A], which a tanh squashes.
    """

    def __init__(self, trunk: nn.Module, net: nn.Module):
        super().__init__()
        self.trunk, self.net = trunk, net

    def forward(self, features: Tensor, noise: Tensor, std: Tensor, clip: float) -> ActorSample:
        """The mean plus std * noise, which lies within +- clip; noise [B, A] is standard normal, std is a
        scalar.

        An action beyond (-1, 1) is set to its edge, with the gradient of the action itself. log_prob is that
        of a Gaussian which neither is clipped nor ends there.
        """
        mean = torch.tanh(self.net(self.trunk(features)))
        free = mean + (std * noise).clamp(-clip, clip)
        action = free + (free.clamp(-EDGE, EDGE) - free).detach()
        log_prob = (-0.5 * ((action - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
        return ActorSample(action, log_prob, mean)


class TwinQ(nn.Module):
    """Two Q functions of (features [B, F], action [B, A]) -> [2, B], on one latent that `trunk` makes.

    Args:
        trunk: features -> latent [B, latent].
    """

    def __init__(self, trunk: nn.Module, latent: int, hidden: int, action_dim: int, gain: float):
        super().__init__()
        self.trunk = trunk
        self.q1 = mlp(latent + action_dim, hidden, 1, gain)
        self.q2 = mlp(latent + action_dim, hidden, 1, gain)

    def forward(self, features: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([self.trunk(features), action], dim=-1)
        return torch.cat([self.q1(x), self.q2(x)], dim=-1).T
