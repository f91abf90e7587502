"""How the VLM's prior pulls the actor: the second term of Eq. 4 (Xia et al. 2026)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .networks import ActorSample


@dataclass(frozen=True)
class Guidance:
    """The form of the guidance term; its weight lambda is `agent.prior_weight`."""

    normalise: Literal["guided", "batch"] = "guided"
    """Average over the rows that carry a prior, or over all rows of the batch."""
    distance: Literal["sample", "mean"] = "sample"
    """Measure from the actor's sampled action, or from its mean action, which leaves its entropy alone."""


def prior_loss(sample: ActorSample, prior: Tensor, mask: Tensor, guidance: Guidance) -> Tensor:
    """`|| a_v - a_r ||^2` of Eq. 4, a scalar; each row has the weight in `mask`, and rows without a prior
    (mask 0) add nothing. 0 if no row has one.

    prior: [B, A]; mask: [B] in [0, 1].
    """
    total = (_squared_distance(sample, prior, guidance) * mask).sum()
    if guidance.normalise == "batch":
        return total / len(mask)
    return total / (mask > 0).sum().clamp(min=1)


@torch.no_grad()
def guidance_figures(
    sample: ActorSample, prior: Tensor, mask: Tensor, q: Tensor, guidance: Guidance, prior_weight: Tensor
) -> dict[str, Tensor]:
    """What a run logs of the term in one update; scalars, for which the host need not wait.

    "prior_loss": the term without lambda. "prior_distance": the mean `|| a_v - a_r ||^2` of the rows that
    carry a prior, whatever their weight. "guided_share": their share. "prior_to_q": lambda times the term,
    relative to the mean |Q|, which it competes with.

    prior: [B, A]; mask: [B] in [0, 1]; q: [B], of the sampled actions.
    """
    guided = mask > 0
    term = prior_loss(sample, prior, mask, guidance)
    distance = (_squared_distance(sample, prior, guidance) * guided).sum() / guided.sum().clamp(min=1)
    return {
        "prior_loss": term,
        "prior_distance": distance,
        "guided_share": guided.float().mean(),
        "prior_to_q": prior_weight * term / q.abs().mean().clamp(min=1e-6),
    }


def _squared_distance(sample: ActorSample, prior: Tensor, guidance: Guidance) -> Tensor:
    action = sample.mean if guidance.distance == "mean" else sample.action
    return (action - prior).square().sum(-1)
