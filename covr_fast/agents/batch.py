"""The fields of a batch that an agent's update reads."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class TransitionBatch(Protocol):
    """A `covr_fast.buffer.Batch[Tensor]`, or a batch of another replay buffer with the same fields.

    A protocol, so that agents do not depend on the replay buffer.
    """

    @property
    def obs(self) -> Tensor: ...
    @property
    def action(self) -> Tensor: ...
    @property
    def reward(self) -> Tensor: ...
    @property
    def next_obs(self) -> Tensor: ...
    @property
    def discount(self) -> Tensor: ...
    @property
    def weight(self) -> Tensor: ...
    @property
    def extras(self) -> Mapping[str, Tensor]: ...
