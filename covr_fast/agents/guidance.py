"""How the VLM's prior pulls the actor: the second term of Eq. 4 (Xia et al. 2026)."""

from dataclasses import dataclass
from typing import Literal

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
    action = sample.mean if guidance.distance == "mean" else sample.action
    total = ((action - prior).square().sum(-1) * mask).sum()
    if guidance.normalise == "batch":
        return total / len(mask)
    return total / (mask > 0).sum().clamp(min=1)
