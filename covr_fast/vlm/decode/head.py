"""The output head for a few tokens only."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.backbones import Backbone

_MOST_ROWS = 1024
"""Hidden states in one call of a head that gives the logits of all tokens: 0.6 GB for 152,000 in float32."""


class TokenScores:
    """The logits of some tokens, by the weights that the head has now. Of a plain head only the rows of these
    tokens are used; another head is called, and gives logits of all tokens.

    Args:
        tokens: int64[U], on the backbone's device.
    """

    def __init__(self, backbone: Backbone, tokens: Tensor) -> None:
        plain = backbone.plain_head
        self._head, self._tokens = backbone.head, tokens
        self._rows = None if plain is None else plain.weight[tokens]

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., D] -> float32[..., U]."""
        if self._rows is not None:
            return F.linear(hidden, self._rows).float()
        parts = hidden.flatten(0, -2).split(_MOST_ROWS)
        logits = torch.cat([self._head(part)[:, self._tokens].float() for part in parts])
        return logits.view(*hidden.shape[:-1], -1)
