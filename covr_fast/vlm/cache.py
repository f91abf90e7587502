"""Key/value caches that start from a prefix shared by the whole batch."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache

Prefix = list[tuple[Tensor, Tensor]]
"""Per layer the keys and values [1, heads, P, head_dim] of the tokens that every row begins with."""


class DecodeCache(Cache):
    """Preallocated keys and values of a batch, for inference.

    The prefix is copied in once, when the cache is made. After that a call costs no allocation: writes go to
    fixed places and reads are views, so a decode step can be captured in a CUDA graph.

    Args:
        prefix: what the first positions hold; empty tensors (P = 0) for none.
        batch: rows.
        capacity: positions in all, prefix included.
    """

    def __init__(self, prefix: Prefix, batch: int, capacity: int) -> None:
        super().__init__(layers=[])
        self._prefix_length = prefix[0][0].shape[2]
        self._length = self._prefix_length
        self._buffers = [
            (self._reserve(k, batch, capacity), self._reserve(v, batch, capacity)) for k, v in prefix
        ]

    @staticmethod
    def _reserve(part: Tensor, batch: int, capacity: int) -> Tensor:
        _, heads, length, dim = part.shape
        buffer = part.new_zeros(batch, heads, capacity, dim)
        buffer[:, :, :length] = part
        return buffer

    def rewind(self) -> None:
        """Forgets everything after the prefix."""
        self._length = self._prefix_length

    def advance(self, tokens: int) -> None:
        """Counts the tokens of the forward that all layers have just written."""
        self._length += tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        keys, values = self._buffers[layer_idx]
        end = self._length + key_states.shape[2]
        keys[:, :, self._length : end] = key_states
        values[:, :, self._length : end] = value_states
        return keys[:, :, :end], values[:, :, :end]


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

    def __init__(self, prefix: Prefix) -> None:
        super().__init__(layers=[])
        self._prefix = prefix

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._prefix[0][0].shape[2]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        keys, values = self._prefix[layer_idx]
        rows = key_states.shape[0]
        return (
            torch.cat((keys.expand(rows, -1, -1, -1), key_states), 2),
            torch.cat((values.expand(rows, -1, -1, -1), value_states), 2),
        )
