"""The losses of SAC from pixels, with the VLM's action prior in the actor's (Xia et al. 2026, Eqs. 1-4).

They are functions of networks and tensors only: noise is an argument, optimizers stay outside, and the host
reads no value. So torch.compile makes one graph of each.

A batch may have K rows of pixels for each of its B transitions (DrQ's shifts): obs and next_obs are then
[K * B, C, H, W], all transitions in their first shift, then all in their second. Everything else has B rows.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..buffer.batch import Batch
from .guidance import Guidance, guidance_figures, prior_loss
from .networks import Actor, TwinQ


class Networks(NamedTuple):
    """What SAC learns, and its targets. The encoder makes of pixels what actor and critic take. log_alpha is
    the logarithm of the temperature, float32[]."""

    encoder: nn.Module
    actor: Actor
    critic: TwinQ
    encoder_target: nn.Module | None
    """None: the critic's target reads the encoder itself."""
    critic_target: TwinQ
    log_alpha: Tensor


@torch.no_grad()
def bellman_target(networks: Networks, batch: Batch[Tensor], noise: Tensor, *, reward_scale: float) -> Tensor:
    """r + discount * (min Q'(s', a') - alpha log pi(a'|s')), Eqs. 2-3, averaged over the K shifts of s'; [B].

    discount is 0 where the episode terminated and gamma^k elsewhere, truncations included. noise [K * B, A]
    is standard normal.
    """
    features = networks.encoder(batch.next_obs)
    next_action = networks.actor(features, noise)
    if networks.encoder_target is not None:
        features = networks.encoder_target(batch.next_obs)
    value: Tensor = (
        networks.critic_target(features, next_action.action).amin(0)
        - networks.log_alpha.exp() * next_action.log_prob
    )
    value = value.view(-1, len(batch.reward)).mean(0)
    return reward_scale * batch.reward + batch.discount * value


def critic_loss(
    networks: Networks, batch: Batch[Tensor], noise: Tensor, *, reward_scale: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss of critic and encoder, the detached features [K * B, F] of batch.obs, and metrics.

    The loss is the mean over the batch of the squared errors, summed over both Q functions and K shifts.
    noise [K * B, A] is standard normal, for the target's actions.
    """
    features = networks.encoder(batch.obs)
    target = bellman_target(networks, batch, noise, reward_scale=reward_scale)
    shifts = len(batch.obs) // len(batch.reward)
    q = networks.critic(features, batch.action.repeat(shifts, 1))
    error = (q.reshape(2 * shifts, len(batch.reward)) - target).square().sum(0)
    loss = (batch.weight * error).mean()
    metrics = {"critic_loss": loss.detach(), "q": q.detach().mean(), "td_error": error.detach().sqrt()}
    return loss, features.detach(), metrics


@torch.no_grad()
def encode(networks: Networks, pixels: Tensor) -> Tensor:
    """Features [B, F] of pixels [B, C, H, W], without a gradient."""
    features: Tensor = networks.encoder(pixels)
    return features


def policy_loss(
    networks: Networks,
    features: Tensor,
    extras: Mapping[str, Tensor],
    noise: Tensor,
    *,
    guide: bool,
    prior_weight: Tensor,
    guidance: Guidance,
    target_entropy: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the actor's and the temperature's loss, and metrics. Neither loss has a gradient for the
    other's parameters.

    The actor's is Eq. 4 on detached features [B, F]: -Q + alpha log pi, plus lambda ||a_v - a_r||^2 if
    `guide`. "prior" [B, A] and "prior_mask" [B] of the extras are read only then. noise [B, A] is standard
    normal.
    """
    sample = networks.actor(features, noise)
    q = networks.critic(features, sample.action).amin(0)
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
