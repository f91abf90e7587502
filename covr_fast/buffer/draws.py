"""The sequence of batches that a seed determines."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _C
from . import processes
from .mirror import Mirror
from .priority_tree import PriorityTree
from .samplers import Prioritized, Recent, SamplerSpec


class DrawSequence:
    """The sequence of batches that a seed determines: batch `number` depends on no batch before it.

    Attributes:
        seed: of the sequence. It changes when the first batch is drawn in another process.
        beta: of the importance weights; 0 without priorities.
        process: where the seed was last valid, as `processes.here` says.
    """

    def __init__(
        self, core: _C.Replay, sampler: SamplerSpec, priorities: PriorityTree | None, seed: int
    ) -> None:
        self.seed = seed
        self.process = processes.here()
        self.beta = sampler.beta if isinstance(sampler, Prioritized) else 0.0
        self._core = core
        self._priorities = priorities
        self._count = 0
        self._launched = 0
        self._lock = threading.Lock()
        self._recency = _C.Recency()
        if isinstance(sampler, Recent):
            self._recency = _C.Recency(sampler.eta**1000, sampler.floor)

    def next_number(self) -> int:
        """The number of the batch that comes next, which then counts as drawn."""
        with self._lock:
            if (here := processes.here()) != self.process:
                self.process = here
                mixed = np.random.SeedSequence([self.seed, *here]).generate_state(1, np.uint64)
                self.seed = int(mixed[0]) >> 1
            self._count += 1
            return self._count - 1

    def draw(self, number: int, request: _C.BatchOut, threads: int) -> None:
        """Draws the ids of batch `number` into the request, and fills it."""
        if self._priorities is None:
            self._core.sample(request, self.seed, number, self._recency, threads)
        else:
            self._core.sample_prioritized(request, self.seed, number, self.beta, threads)

    def get(self, number: int, request: _C.BatchOut, threads: int) -> None:
        """Fills a request whose ids are given, with the augmentation of batch `number`."""
        self._core.get(request, self.seed, number, threads)

    def observe(self, request: _C.ObservationsOut, threads: int) -> None:
        """Fills a request for observations only, whose ids are given."""
        self._core.observe(request, threads)

    @contextmanager
    def drawing(self, number: int) -> Iterator[None]:
        """For a block in which `launch` runs once: called there, or replayed in a CUDA graph.

        Raises:
            IndexError: nothing can be sampled yet.
        """
        self._launched = number
        yield

    def launch(self, request: Any, how: Any) -> None:
        """Draws the next batch into the request. On a GPU, a CUDA graph may contain it: each of its replays
        draws the batch after the one before."""
        self.draw(self._launched, request, how)

    def launch_priorities(self, index: Tensor, priority: Tensor) -> None:
        """Sets priorities, both [n] on the buffer's device. On a GPU, a CUDA graph may contain it."""
        self._core.set_priorities(index.numpy(), priority.double().numpy())

    @property
    def nbytes(self) -> int:
        return 0 if self._priorities is None else self._priorities.nbytes

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors share memory with this object."""
        state = {
            "sampling": torch.tensor([self.seed, self._count], dtype=torch.int64, device="cpu"),
            "beta": torch.tensor([self.beta], dtype=torch.float64, device="cpu"),
        }
        if self._priorities is not None:
            state |= self._priorities.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """`state` may have other tensors, too."""
        self.seed, self._count = state["sampling"].tolist()
        self.beta = float(state["beta"])
        if self._priorities is not None:
            self._priorities.load_state_dict(state)


class DeviceDraws(DrawSequence):
    """The same sequence where a mirror draws: the rows of a seed and a number are those of the CPU.

    Every call belongs into a `reading` of gpu.DeviceGather.
    """

    def __init__(
        self,
        core: _C.Replay,
        sampler: SamplerSpec,
        priorities: PriorityTree | None,
        seed: int,
        mirror: Mirror,
    ) -> None:
        super().__init__(core, sampler, priorities, seed)
        self._mirror = mirror

    def draw(self, number: int, request: Any, plans: Any) -> None:
        with self.drawing(number):
            self.launch(request, plans)

    def get(self, number: int, request: Any, plans: Any) -> None:
        with self._counting(number):
            self._mirror.core.get(request, plans, self._mirror.stream)

    def observe(self, request: Any, plans: Any) -> None:
        self._mirror.core.observe(request, plans, self._mirror.stream)

    @contextmanager
    def drawing(self, number: int) -> Iterator[None]:
        if not self._core.samplable():
            self._mirror.adding.drain()  # the host's tables may not know it yet
        if not self._core.samplable():
            raise IndexError(_C.nothing_to_sample)
        with self._counting(number):
            yield

    def launch(self, request: Any, plans: Any) -> None:
        self._mirror.core.sample(request, self._recency, plans, self._mirror.stream)

    def launch_priorities(self, index: Tensor, priority: Tensor) -> None:
        self._mirror.set_priorities(index, priority.float())

    @contextmanager
    def _counting(self, number: int) -> Iterator[None]:
        self._mirror.expect(self.seed, number, self.beta)
        try:
            yield
        except BaseException:
            self._mirror.lost_count()
            raise
        self._mirror.drawn()
