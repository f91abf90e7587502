"""DeepMDP's models of reward and transition, which also train the encoder (Gelada et al. 2019).

As facebookresearch/deep_bisim4control has them (agent/deepmdp_agent.py, transition_model.py), with its
deterministic transition model and without its optional decoder of pixels.
"""

import torch
from torch import Tensor, nn

from ..buffer.batch import Batch
from .encoder import MADE
from .losses import Networks

WIDTH = 512


class LatentModels(nn.Module):
    """(latent [B, D], action [B, A]) -> the next latent [B, D] and the reward [B]: each a hidden layer of 512
    with LayerNorm and ReLU, in torch's own initialisation."""

    def __init__(self, latent: int, action_dim: int):
        super().__init__()
        self.transition = _model(latent + action_dim, latent)
        self.reward = _model(latent + action_dim, 1)

    def forward(self, latent: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([latent, action], dim=-1)
        return self.transition(x), self.reward(x).squeeze(-1)


def _model(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, WIDTH, **MADE),
        nn.LayerNorm(WIDTH, **MADE),
        nn.ReLU(),
        nn.Linear(WIDTH, outputs, **MADE),
    )


def model_loss(networks: Networks, models: LatentModels, batch: Batch[Tensor]) -> tuple[Tensor, Tensor]:
    """The loss of encoder and models, and its two parts, detached: [2].

    mean 0.5 (predicted next latent - next latent)^2 + mean (predicted reward - reward)^2, where the next
    latent has no gradient. The latents are those of the critic's side. It is meant for one-step transitions.
    """
    latent = networks.critic.trunk(networks.encoder(batch.obs))
    with torch.no_grad():
        after = networks.critic.trunk(networks.encoder(batch.next_obs))
    predicted, reward = models(latent, batch.action)
    transition = 0.5 * (predicted - after).square().mean()
    of_reward = (reward - batch.reward).square().mean()
    return transition + of_reward, torch.stack([transition.detach(), of_reward.detach()])
