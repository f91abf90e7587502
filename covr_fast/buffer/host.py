"""Buffers whose batches are made by the CPU."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import _C
from .batch import Batch
from .output import Draw, OutputSpec


class HostGather:
    """Gathers on the CPU, where nothing waits: the lock of the C++ core is enough."""

    pin_memory = False

    def __init__(self) -> None:
        self._pool = _C.OutputPool()
        self.lock: AbstractContextManager[Any] = nullcontext()

    def adding(self) -> AbstractContextManager[None]:
        return self.lock

    def start_reading(self) -> None:
        pass

    def reading(self) -> AbstractContextManager[None]:
        return self.lock

    def allocate(self, spec: OutputSpec, n: int) -> list[Tensor]:
        return spec.allocate(n, self._pool)

    def fill(
        self,
        request: _C.ObservationsOut,
        draw: Draw,
        spec: OutputSpec,
        obs: list[Tensor],
        next_obs: list[Tensor],
    ) -> None:
        to_next = spec.contiguous(next_obs) if next_obs else [None] * len(obs)
        for key in zip(spec.targets, spec.contiguous(obs), to_next, strict=True):
            request.add_key(*key)
        draw(request, torch.get_num_threads())

    def frames(self, ring: Tensor, streams: Tensor, slots: Tensor) -> Tensor:
        return ring[streams, slots]

    def deliver(self, batch: Batch) -> None:
        pass
