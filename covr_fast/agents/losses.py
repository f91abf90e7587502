"""The losses of SAC from pixels, with the VLM's action prior in the actor's (Xia et al. 2026, Eqs. 1-4).

They are functions of networks and tensors only: noise is an argument, optimizers stay outside, and the host
reads no value. So torch.compile makes one graph of each.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..buffer.batch import Batch
from .guidance import Guidance, guidance_figures, prior_loss
from .networks import Actor, Encoder, TwinQ


class Networks(NamedTuple):
    """What SAC learns, and its critic's target. log_alpha is the logarithm of the temperature, float32[]."""

    encoder: Encoder
    actor: Actor
    critic: TwinQ
    critic_target: TwinQ
    log_alpha: Tensor


@torch.no_grad()
def bellman_target(networks: Networks, batch: Batch[Tensor], noise: Tensor, *, reward_scale: float) -> Tensor:
    """r + discount * (min Q'(s', a') - alpha log pi(a'|s')), Eqs. 2-3; [B].

    discount is 0 where the episode terminated and gamma^k elsewhere, truncations included. noise [B, A] is
    standard normal.
    """
    latent = networks.encoder(batch.next_obs)
    next_action = networks.actor(latent, noise)
    value: Tensor = (
        networks.critic_target(latent, next_action.action).amin(0)
        - networks.log_alpha.exp() * next_action.log_prob
    )
    return reward_scale * batch.reward + batch.discount * value


def critic_loss(
    networks: Networks, batch: Batch[Tensor], noise: Tensor, *, reward_scale: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss of critic and encoder, the detached latents [B, D] of batch.obs, and metrics.

    noise [B, A] is standard normal, for the target's actions.
    """
    latent = networks.encoder(batch.obs)
    target = bellman_target(networks, batch, noise, reward_scale=reward_scale)
    q = networks.critic(latent, batch.action)
    error = (q - target).square().sum(0)
    loss = (batch.weight * error).mean()
    metrics = {"critic_loss": loss.detach(), "q": q.detach().mean(), "td_error": error.detach().sqrt()}
    return loss, latent.detach(), metrics


def policy_loss(
    networks: Networks,
    latent: Tensor,
    extras: Mapping[str, Tensor],
    noise: Tensor,
    *,
    guide: bool,
    prior_weight: float,
    guidance: Guidance,
    target_entropy: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the actor's and the temperature's loss, and metrics. Neither loss has a gradient for the
    other's parameters.

    The actor's is Eq. 4 on detached latents [B, D]: -Q + alpha log pi, plus lambda ||a_v - a_r||^2 if
    `guide`. "prior" [B, A] and "prior_mask" [B] of the extras are read only then. noise [B, A] is standard
    normal.
    """
    sample = networks.actor(latent, noise)
    q = networks.critic(latent, sample.action).amin(0)
    alpha = networks.log_alpha.exp()
    loss = (alpha.detach() * sample.log_prob - q).mean()
    entropy = -sample.log_prob.detach().mean()
    metrics = {"entropy": entropy}
    if guide:
        prior, mask = extras["prior"], extras["prior_mask"]
        loss = loss + prior_weight * prior_loss(sample, prior, mask, guidance)
        metrics |= guidance_figures(sample, prior, mask, q, guidance, prior_weight)
    metrics |= {"actor_loss": loss.detach(), "alpha": alpha.detach()}
    return loss + alpha * (entropy - target_entropy), metrics
