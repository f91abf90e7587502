"""The agent's networks: a convolutional encoder, a squashed Gaussian actor and twin Q functions."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError

# Explicit, because other libraries change torch's defaults while they load.
_MADE: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def _orthogonal(module: nn.Module, gain: float = math.sqrt(2)) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.orthogonal_(module.weight, gain)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """A network with two hidden layers and ReLU."""
    net = nn.Sequential(
        nn.Linear(inputs, hidden, **_MADE),
        nn.ReLU(),
        nn.Linear(hidden, hidden, **_MADE),
        nn.ReLU(),
        nn.Linear(hidden, outputs, **_MADE),
    )
    net.apply(_orthogonal)
    return net


class Encoder(nn.Module):
    """Pixels [B, C, H, W] in [0, 1], of any floating dtype -> latent float32[B, latent_dim] in (-1, 1).

    The first convolution is 5x5, the others 3x3. They compute in `dtype` (their weights are float32 all the
    same); what follows, in float32.
    """

    def __init__(
        self,
        obs_shape: tuple[int, ...],
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        latent: int,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.dtype = dtype
        if len(channels) != len(strides):
            raise UserError(
                f"agent.channels={channels} and agent.strides={strides} must have the same length"
            )
        layers: list[nn.Module] = []
        inputs = obs_shape[0]
        for i, (width, stride) in enumerate(zip(channels, strides, strict=True)):
            layers += [nn.Conv2d(inputs, width, 5 if i == 0 else 3, stride, **_MADE), nn.ReLU()]
            inputs = width
        self.convolutions = nn.Sequential(*layers)
        self.convolutions.apply(_orthogonal)
        try:
            with torch.no_grad():
                features = self.convolutions(torch.zeros(1, *obs_shape, **_MADE)).numel()
        except RuntimeError as error:
            raise UserError(
                f"frames of {obs_shape[1]}x{obs_shape[2]} are too small for agent.strides={strides}: "
                "use larger frames or fewer convolutions"
            ) from error
        self.project = nn.Linear(features, latent, **_MADE)
        _orthogonal(self.project, 1.0)
        self.norm = nn.LayerNorm(latent, **_MADE)
        # For these shapes two to five times as fast as channels first on a CPU. Tensor cores need it too.
        self.convolutions.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.dtype, memory_format=torch.channels_last)
        with torch.autocast(pixels.device.type, self.dtype, enabled=self.dtype != torch.float32):
            x = self.convolutions(pixels)
        return torch.tanh(self.norm(self.project(x.flatten(1).float())))


class ActorSample(NamedTuple):
    """action [B, A] in (-1, 1), log_prob [B] of it, and mean [B, A], the squashed mean action."""

    action: Tensor
    log_prob: Tensor
    mean: Tensor


class Actor(nn.Module):
    """Squashed Gaussian policy on a latent [B, D]."""

    LOG_STD = (-5.0, 2.0)

    def __init__(self, latent: int, hidden: int, action_dim: int):
        super().__init__()
        self.net = mlp(latent, hidden, 2 * action_dim)
        # The mean starts near zero for every latent, so the first exploration is unbiased.
        _orthogonal(self.net[-1], 0.01)

    def forward(self, latent: Tensor, noise: Tensor) -> ActorSample:
        """Reparameterised sample; noise [B, A] is standard normal."""
        mean, raw = self.net(latent).chunk(2, dim=-1)
        low, high = self.LOG_STD
        log_std = low + 0.5 * (high - low) * (torch.tanh(raw) + 1)
        action = mean + log_std.exp() * noise
        log_prob = (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        # log(1 - tanh(x)^2), in a form that stays accurate for large |x|.
        log_prob = log_prob - (2 * (math.log(2) - action - F.softplus(-2 * action))).sum(-1)
        return ActorSample(torch.tanh(action), log_prob, torch.tanh(mean))


class TwinQ(nn.Module):
    """Two Q functions of (latent [B, D], action [B, A]) -> [2, B]."""

    def __init__(self, latent: int, hidden: int, action_dim: int):
        super().__init__()
        self.q1 = mlp(latent + action_dim, hidden, 1)
        self.q2 = mlp(latent + action_dim, hidden, 1)

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([latent, action], dim=-1)
        return torch.cat([self.q1(x), self.q2(x)], dim=-1).T
