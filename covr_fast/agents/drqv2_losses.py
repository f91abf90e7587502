"""The losses of DrQ-v2 (Yarats et al. 2022), with the VLM's action prior in the actor's
(Xia et al. 2026, Eq. 4).

They are functions of networks and tensors only, like those of SAC (`losses`).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..buffer.batch import Batch
from .guidance import Guidance, guidance_figures, prior_loss
from .networks import NoisyActor, TwinQ


class Networks(NamedTuple):
    """What DrQ-v2 learns, and its critic's target."""

    encoder: nn.Module
    actor: NoisyActor
    critic: TwinQ
    critic_target: TwinQ


@torch.no_grad()
def bellman_target(
    networks: Networks,
    batch: Batch[Tensor],
    noise: Tensor,
    std: Tensor,
    *,
    std_clip: float,
    reward_scale: float,
) -> Tensor:
    """r + discount * min Q'(s', a'), [B], where a' is the policy's action with clipped noise.

    discount is 0 where the episode terminated and gamma^k elsewhere, truncations included.
    """
    features = networks.encoder(batch.next_obs)
    action = networks.actor(features, noise, std, std_clip).action
    value: Tensor = networks.critic_target(features, action).amin(0)
    return reward_scale * batch.reward + batch.discount * value


def critic_loss(
    networks: Networks,
    batch: Batch[Tensor],
    noise: Tensor,
    std: Tensor,
    *,
    std_clip: float,
    reward_scale: float,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss of critic and encoder, the detached features [B, F] of batch.obs, and metrics.

    noise [B, A] is standard normal, for the target's actions.
    """
    features = networks.encoder(batch.obs)
    target = bellman_target(networks, batch, noise, std, std_clip=std_clip, reward_scale=reward_scale)
    q = networks.critic(features, batch.action)
    error = (q - target).square().sum(0)
    loss = (batch.weight * error).mean()
    metrics = {"critic_loss": loss.detach(), "q": q.detach().mean(), "td_error": error.detach().sqrt()}
    return loss, features.detach(), metrics


def noise_entropy(std: Tensor, action_dim: int) -> Tensor:
    """The entropy in nats of `action_dim` Gaussians of standard deviation `std`, a scalar as `std`."""
    return action_dim * (std.log() + 0.5 * (1 + math.log(2 * math.pi)))


def policy_loss(
    networks: Networks,
    features: Tensor,
    extras: Mapping[str, Tensor],
    noise: Tensor,
    std: Tensor,
    *,
    std_clip: float,
    guide: bool,
    prior_weight: Tensor,
    guidance: Guidance,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The actor's loss on detached features [B, F], and metrics: -Q, plus lambda ||a_v - a_r||^2 if `guide`.

    "prior" [B, A] and "prior_mask" [B] of the extras are read only then. noise [B, A] is standard normal.
    """
    sample = networks.actor(features, noise, std, std_clip)
    q = networks.critic(features, sample.action).amin(0)
    loss = -q.mean()
    metrics = {}
    if guide:
        prior, mask = extras["prior"], extras["prior_mask"]
        loss = loss + prior_weight * prior_loss(sample, prior, mask, guidance)
        metrics = guidance_figures(sample, prior, mask, q, guidance, prior_weight)
    metrics |= {"actor_loss": loss.detach(), "noise": std.clone()}
    return loss, metrics | {"entropy": noise_entropy(std, sample.mean.shape[-1])}
