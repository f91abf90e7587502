"""Caches with which transformers' decoders train on rows that share a prefix."""

from torch import Tensor
from transformers.cache_utils import Cache

from .rows import Padded

Prefix = list[tuple[Tensor, Tensor]]
"""Per layer the keys and values [1, heads, P, head_dim] of the tokens that every row begins with."""


class RecordingCache(Cache):
    """Keeps the keys and values of one forward from position 0: this is how a prefix is made."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.prefix: Prefix = []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.prefix.append((key_states, value_states))
        return key_states, value_states


class TrainingCache(Cache):
    """Puts the prefix before the keys and values of each layer, letting gradients through to it.

    The prefix is computed once per micro-batch instead of once per row; autograd adds up what the rows send
    back, so the gradient is the one of repeating the prefix in every row.
    """

    def __init__(self, prefix: Prefix, rows: Padded) -> None:
        super().__init__(layers=[])
        self._prefix = prefix
        self._rows = rows

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._prefix[0][0].shape[2]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        keys, values = self._prefix[layer_idx]
        return self._rows.behind(keys, key_states), self._rows.behind(values, value_states)
