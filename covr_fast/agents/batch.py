"""What an agent's update reads of a batch."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class TransitionBatch(Protocol):
    """What an update reads of a replay batch; see covr_fast.ReplayBuffer.sample."""

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
