"""Buffers whose batches are made by a GPU.

What waits for what: `add` sends new frames on its own stream, after all gathers have read what they replace.
A gather runs on the caller's current stream, after the last frames were sent and after the gather before it,
whichever stream that was on. The host waits in `add` only: until the frames of the add before have left host
memory (device storage), or until the last gather has read what is being overwritten (pinned storage, where
the CPU writes what the GPU reads).
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from .. import _C
from ..architectures import kernel_obstacle
from .batch import Batch
from .options import Shape
from .output import Draw, Gather, OutputSpec

Placement = Literal["device", "pinned"]


class DeviceGather(Gather):
    """Plans on the CPU, gathers on the GPU."""

    pin_memory = True

    def __init__(self, device: torch.device, core: _C.Replay, pinned: bool) -> None:
        super().__init__()
        self._device = device
        self._core = core
        self._pinned = pinned
        cuda: Any = torch.cuda  # these constructors have no annotations
        self._upload_stream = cuda.Stream(device)
        self._sent, self._read = cuda.Event(), cuda.Event()
        self.lock = threading.Lock()  # for kernel launches that belong together with a call of the core

    @contextmanager
    def adding(self) -> Iterator[None]:
        with self.lock:
            (self._read if self._pinned else self._sent).synchronize()
            yield
            if not self._pinned:
                self._upload_stream.wait_event(self._read)
                self._core.upload_cuda(self._upload_stream.cuda_stream)
                self._sent.record(self._upload_stream)

    def start_reading(self) -> None:
        """The caller's current stream waits until all frames have arrived."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._sent)
        current.wait_event(self._read)  # so that this one event stands for the reads on other streams too

    @contextmanager
    def reading(self) -> Iterator[None]:
        """What the block reads on the caller's current stream is replaced only after it was read."""
        self.start_reading()
        yield
        self._read.record(torch.cuda.current_stream(self._device))

    def empty(self, shape: Shape, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def fill(
        self,
        request: _C.ObservationsOut,
        draw: Draw,
        spec: OutputSpec,
        obs: list[Tensor],
        next_obs: list[Tensor],
    ) -> None:
        with self.lock:
            draw(request, torch.get_num_threads())
            with self.reading():
                self._gather(request, spec, obs, next_obs)

    def _gather(
        self, request: _C.ObservationsOut, spec: OutputSpec, obs: list[Tensor], next_obs: list[Tensor]
    ) -> None:
        n = len(obs[0])
        current = torch.cuda.current_stream(self._device).cuda_stream
        outputs = [spec.contiguous(out) for out in (obs, next_obs) if out]
        for k, target in enumerate(spec.targets):
            plans = torch.empty(
                len(outputs), n, _C.stack_plan_bytes, dtype=torch.uint8, device="cpu", pin_memory=True
            )
            self._core.plan_cuda(k, request, plans)
            on_device = plans.to(obs[0].device, non_blocking=True)
            for plan, to in zip(on_device, outputs, strict=True):
                self._core.gather_cuda(k, plan, target, to[k], current)

    def frames(self, ring: Tensor, streams: Tensor, slots: Tensor) -> Tensor:
        if ring.is_cuda:  # indices in ordinary memory would make the host wait for the stream
            return ring[self._send(streams.pin_memory()), self._send(slots.pin_memory())]
        return self._send(ring[streams, slots].pin_memory())

    def deliver(self, batch: Batch) -> None:
        batch.action = self._send(batch.action)
        batch.extras = {name: self._send(values) for name, values in batch.extras.items()}
        batch.reward, batch.discount = self._send(batch.reward), self._send(batch.discount)
        batch.weight = self._send(batch.weight)
        batch.terminated, batch.truncated = self._send(batch.terminated), self._send(batch.truncated)

    def _send(self, values: Tensor) -> Tensor:
        return values.to(self._device, non_blocking=True)


def check_device(device: torch.device, storage: Placement) -> None:
    """Says why a buffer cannot be on this device."""
    if storage not in ("device", "pinned"):
        raise ValueError(f"storage is {storage!r}: it must be 'device' or 'pinned'")
    if device.type == "cpu" and storage == "device":
        return
    if device.type != "cuda":
        raise ValueError(
            f"device is {device}, storage {storage}: pinned storage is for "
            "device='cuda', and buffers are made on 'cpu' or 'cuda'"
        )
    if not _C.with_cuda:
        raise RuntimeError("this build has no CUDA kernels: rebuild with nvcc on PATH and COVR_CUDA=ON")
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no CUDA device: use device='cpu'")
    if (obstacle := kernel_obstacle(device)) is not None:
        raise RuntimeError(f"device {device}: {obstacle}, or use device='cpu'")
