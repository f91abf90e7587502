"""Batches of one form, drawn by whoever uses them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial

import torch
from torch import Tensor

from .batch import Batch
from .draws import DrawSequence
from .output import BatchWriter, Gather, OutputSpec


class Sampling:
    """What `ReplayBuffer.sampling` returns: `sample` with its arguments settled.

    `sample()` returns a new batch. The other way is for a CUDA graph, which must find everything at the same
    place each time it is launched: `launch` queues the kernels that draw the next batch into `batch`. Within
    `turn`, it is called once, or recorded earlier and replayed once.

    Attributes:
        device: where batches arrive.
        prioritized: whether `update_priorities` is to be called with each batch's TD errors.
        update_priorities: the buffer's method.
    """

    def __init__(
        self,
        batches: BatchWriter,
        draws: DrawSequence,
        gather: Gather,
        spec: OutputSpec,
        *,
        batch_size: int,
        n_step: int,
        sample: Callable[[], Batch],
        update_priorities: Callable[[Tensor, Tensor], None] | None,
    ) -> None:
        self.device = torch.empty(0, device=gather.device).device  # with its index
        self.prioritized = update_priorities is not None
        self.sample = sample
        self.update_priorities = update_priorities
        self._batches, self._draws, self._gather, self._spec = batches, draws, gather, spec
        self._batch_size, self._n_step = batch_size, n_step

    def keep_priorities(self) -> None:
        """Someone else sets the priorities: those of a batch are not to be replaced by its TD errors."""
        self.prioritized, self.update_priorities = False, None

    @cached_property
    def batch(self) -> Batch:
        """Where `launch` writes."""
        return self._batches.allocate(self._batch_size, self._spec)

    @cached_property
    def _launch(self) -> Callable[[], None]:
        request = self._batches.request(self.batch, self._n_step, self._spec)
        how = self._gather.how(self._batch_size, True)
        return partial(self._draws.launch, request, how)  # without `self`, which would be a cycle

    @contextmanager
    def turn(self) -> Iterator[None]:
        """For a block in which `launch` runs once: the next batch of the buffer's sequence. It waits for what
        was added, as `sample` does, and locks the buffer.

        Raises:
            IndexError: nothing can be sampled yet.
        """
        _ = self._launch  # its memory must not be a graph's
        with self._gather.reading(), self._draws.drawing(self._draws.next_number()):
            yield

    def launch(self) -> None:
        """Draws the next batch into `batch`."""
        self._launch()

    def launch_priorities(self, priority: Tensor) -> None:
        """New priorities, float [B], of the transitions in `batch`."""
        self._draws.launch_priorities(self.batch.index, priority.detach())
