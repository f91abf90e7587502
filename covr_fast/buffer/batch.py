"""What `ReplayBuffer.sample` returns."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Protocol

import torch
from torch import Tensor
from typing_extensions import (
    TypeVar,
)  # typing's has no defaults before Python 3.13; torch requires this package

Observation = Tensor | dict[str, Tensor]

ObsT = TypeVar("ObsT", default=Any)
"""Tensor, or dict[str, Tensor] where the buffer's obs_shape is a dict."""


@dataclass(slots=True)
class Batch(Generic[ObsT]):
    """B transitions. With n-step returns, `k` below is n, or less where the episode ended earlier.

    The tensors own their memory: they stay valid and unchanged while anything refers to them, unless the
    batch is given to `sample(out=...)`.
    """

    obs: ObsT
    """[B, C * stack, H, W] (or a dict of tensors by key), oldest frame first."""
    action: Tensor
    """[B, *action_shape]."""
    reward: Tensor
    """float32 [B]: sum of gamma^j * r_{t+j} over the k steps."""
    next_obs: ObsT
    """Like obs, k steps later."""
    discount: Tensor
    """float32 [B]: gamma^k, or 0 where the episode terminated within the k steps."""
    terminated: Tensor
    """bool [B]: the last of the k steps terminated the episode."""
    truncated: Tensor
    """bool [B]: the last of the k steps truncated the episode."""
    index: Tensor
    """int64 [B]: ids for `update_priorities`, `set_extras`, `observations`. Never reused. Of a GPU's buffer
    it is on the GPU: there `update_priorities` takes it as it is, and the other methods wait for it."""
    weight: Tensor
    """float32 [B]: importance weights of the prioritized sampler, otherwise ones."""
    extras: dict[str, Tensor]
    """The declared extras, each [B, *shape]."""
    obs_offset: Tensor | None = None
    """int64 [B, 2]: the (y, x) offsets that the augmentation used for obs; None without one. Of the window in
    the image, which a shift enlarges by `pad` at every edge; of a translation, of the image on black."""
    next_obs_offset: Tensor | None = None
    """int64 [B, 2]: the same for next_obs; of a translation, equal to obs_offset."""

    def to(self, device: torch.device | str) -> "Batch[ObsT]":
        """The batch on another device. `index` and the offsets stay where they are: on the buffer's."""
        staying = ("index", "obs_offset", "next_obs_offset")
        moving = [field.name for field in fields(self) if field.name not in staying]
        moved: dict[str, Any] = {name: _moved(getattr(self, name), device) for name in moving}
        return replace(self, **moved)


class BatchSource(Protocol):
    """Where an agent draws its batches from; see buffer.sampling.Sampling."""

    @property
    def device(self) -> torch.device: ...
    @property
    def prioritized(self) -> bool: ...
    @property
    def batch(self) -> Batch: ...
    @property
    def sample(self) -> Callable[[], Batch]: ...
    @property
    def update_priorities(self) -> Callable[[Tensor, Tensor], None] | None: ...
    def turn(self) -> AbstractContextManager[None]: ...
    def launch(self) -> None: ...
    def launch_priorities(self, priority: Tensor) -> None: ...


def _moved(value: Observation, device: torch.device | str) -> Observation:
    if isinstance(value, Mapping):
        return {name: tensor.to(device) for name, tensor in value.items()}
    return value.to(device)


def pixels(observation: Observation) -> Tensor:
    """The observations of a buffer whose obs_shape is no dict, as the type checker cannot know.

    Raises:
        TypeError: they are a dict.
    """
    if not isinstance(observation, Tensor):
        raise TypeError(f"observations have the keys {sorted(observation)}: expected one tensor")
    return observation
