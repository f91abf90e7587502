"""The whole policy update as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ..cuda_graph import Captured, Graphs, Tensors
from .batch import TransitionBatch

FIELDS = ("obs", "action", "reward", "next_obs", "discount", "weight")
EXTRAS = ("prior", "prior_mask")  # read under guidance only

Update = Callable[[TransitionBatch, bool], dict[str, Tensor]]


@dataclass(frozen=True)
class _StaticBatch:
    """A TransitionBatch of a graph's static inputs."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    discount: Tensor
    weight: Tensor
    extras: Tensors


class CapturedUpdate:
    """An agent's update that is replayed as a graph: one for each value of `guide`, which the end of the cold
    start flips once.

    Inside the graph: all of the update, from the encoder's forward through the noise, the backward passes
    and the optimizers' steps to the target's. Outside, on the caller's stream around it: sampling (the batch
    comes from wherever it comes), the copy of the batch to the static inputs and that of the metrics out of
    the graph. The batch's copy reads and writes 8 B C H W bytes for float32 obs and next_obs (106 MB each way
    for 256 stacks of 9x76x76) and little else; only a replay buffer that wrote to the static inputs itself
    would save it. Whatever reads a metric waits for the device, and prioritized replay does so every time.

    What waits for what: each call is a turn of `graphs`, on the caller's current stream. Weights are changed
    in place, so an eager call on that stream (acting, evaluating) sees them as the last update left them.

    Args:
        update: of a batch and `guide` -> metrics, changing weights and optimizer state in place.
        graphs: with the generators that `update` draws from.
    """

    def __init__(self, update: Update, graphs: Graphs) -> None:
        self._update = update
        self._graphs = graphs
        self._captured: dict[bool, Captured] = {}

    def __call__(self, batch: TransitionBatch, guide: bool) -> dict[str, Tensor]:
        """The update's metrics, in tensors that are the caller's.

        Raises:
            ValueError: the batch is of another size, dtype or device than those before.
        """
        if guide not in self._captured:
            self._captured[guide] = Captured(partial(_run, self._update, guide), self._graphs)
        return self._captured[guide](_inputs(batch, guide))

    def forget(self) -> None:
        """Drops the graphs: what they change in place (an optimizer's state) has been replaced."""
        self._captured.clear()


def _inputs(batch: TransitionBatch, guide: bool) -> dict[str, Tensor]:
    """What an update reads of the batch, by name."""
    inputs = {name: getattr(batch, name) for name in FIELDS}
    return inputs | {name: batch.extras[name] for name in EXTRAS if guide}


def _run(update: Update, guide: bool, inputs: Tensors) -> dict[str, Tensor]:
    fields = {name: inputs[name] for name in FIELDS}
    return update(_StaticBatch(**fields, extras={name: inputs[name] for name in EXTRAS if guide}), guide)
