"""Buffers whose batches are made by a GPU.

Frames, and a mirror of all bookkeeping (`mirror.Mirror`), are on the device. So a batch is drawn, planned and
gathered by kernels of one stream, which need nothing from the host; a CUDA graph may contain them.

What waits for what:

- One lock covers bookkeeping and launches: whatever changes the host's tables, or launches something that
  reads or changes the mirror, holds it until its launches are queued. So the order of calls is the order on
  the device. It is acquired before the lock of the C++ core.
- What changes on the host (`changing`: cutting, corrections; `add`: new rows of host memory) is sent on a
  stream of the buffer's own, after all batches that were started before have read what is being replaced.
- What runs on a caller's stream (`reading`: batches, new priorities; `add_tensors`: new rows of device
  memory) comes after all that was sent before, and after the work of earlier callers, on whichever streams.
- Rows of device memory are decided there. The host's tables follow when they are asked for (`drain`, then the
  host waits) or changed. See device_add.py, also for the order of blocks in pinned memory.
- Otherwise the host waits, in pinned storage, until the last batch has read what the CPU is about to
  overwrite; in `add`, until the rows of the call before the last have left host memory; and where a caller
  asks for something of the device: when a batch's `index` is given to a method that answers from the host's
  tables, and in loading and saving.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .. import _C
from ..architectures import kernel_obstacle
from ..streams import current_on
from .device_arguments import DeviceRows
from .mirror import Mirror
from .options import Shape
from .output import Changed, Draw, Gather, HostRows

Placement = Literal["device", "pinned"]


class DeviceGather(Gather):
    """Fills batches on the GPU."""

    # Builds without CUDA have none.
    batch_out = getattr(_C, "CudaBatchOut", None)
    observations_out = getattr(_C, "CudaObservationsOut", None)

    def __init__(self, device: torch.device, mirror: Mirror, pinned: bool) -> None:
        super().__init__()
        self.device = device
        self.mirror = mirror
        self._pinned = pinned
        cuda: Any = torch.cuda  # these constructors have no annotations
        self._upload_stream = cuda.Stream(device)
        self._sent, self._used = cuda.Event(), cuda.Event()
        self._used.record(cuda.current_stream(device))  # the mirror was filled with zeros there
        self.lock = threading.RLock()

    def add(self, core: _C.Replay, rows: HostRows) -> Any:
        with self.lock, current_on(self.device):
            if self._pinned:
                self._used.synchronize()
            self._upload_stream.wait_event(self._used)
            ids = self.mirror.adding.from_host(rows, self._upload_stream)
            self._sent.record(self._upload_stream)
            return ids

    def add_tensors(self, rows: DeviceRows) -> Tensor:
        """Adds rows of device memory on the caller's current stream. Returns their ids, int64 [rows]."""
        with self.lock, current_on(self.device):
            self.start_reading()
            ids = self.mirror.adding.from_device(rows)
            self._sent.record(torch.cuda.current_stream(self.device))
            return ids

    def drain(self) -> None:
        with self.lock:
            self.mirror.adding.drain()

    @contextmanager
    def changing(self) -> Iterator[Changed]:
        changes: list[tuple[np.ndarray, Iterable[str] | None]] = []
        with self.lock, current_on(self.device):
            self.drain()
            if self._pinned:
                self._used.synchronize()
            yield lambda rows, names=None: changes.append((rows, names))
            with torch.cuda.stream(self._upload_stream):
                self._upload_stream.wait_event(self._used)
                for rows, names in changes:
                    self.mirror.sync_rows(rows, names)
                self.mirror.sync_streams()
                self.mirror.follow()
                self._sent.record(self._upload_stream)

    def start_reading(self) -> None:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self._sent)
        current.wait_event(self._used)  # so that this one event stands for the work on other streams too

    @contextmanager
    def reading(self) -> Iterator[None]:
        with self.lock, current_on(self.device):
            self.start_reading()
            try:
                yield
            finally:  # a block that raises may have queued something before
                self._used.record(torch.cuda.current_stream(self.device))

    def replaced(self) -> None:
        self.mirror.sync_all()

    def empty(self, shape: Shape, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def fill(self, request: Any, draw: Draw, n: int, with_next: bool) -> None:
        with self.reading():
            draw(request, self.how(n, with_next))

    def how(self, n: int, with_next: bool) -> Tensor:
        return self.mirror.plans(n, with_next)

    def ids(self, index: Tensor) -> Tensor:
        return self.mirror.send(index)

    def frames(self, ring: Tensor, streams: Tensor, slots: Tensor) -> Tensor:
        if ring.is_cuda:  # indices in ordinary memory would make the host wait for the stream
            return ring[self.mirror.send(streams), self.mirror.send(slots)]
        return self.mirror.send(ring[streams, slots])


def checked_device(device: torch.device, storage: Placement) -> torch.device:
    """The device, a GPU with its number; "cuda" is the current one.

    Raises:
        ValueError, RuntimeError: why a buffer cannot be on it.
    """
    if storage not in ("device", "pinned"):
        raise ValueError(f"storage is {storage!r}: it must be 'device' or 'pinned'")
    if device.type == "cpu" and storage == "device":
        return device
    if device.type != "cuda":
        raise ValueError(
            f"device is {device}, storage {storage}: pinned storage is for "
            "device='cuda', and buffers are made on 'cpu' or 'cuda'"
        )
    if not _C.with_cuda:
        raise RuntimeError("this build has no CUDA kernels: rebuild with nvcc on PATH and COVR_CUDA=ON")
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no CUDA device: use device='cpu'")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise RuntimeError(f"device is {device}, and torch finds {torch.cuda.device_count()} CUDA devices")
    device = torch.device("cuda", index)
    if (obstacle := kernel_obstacle(device)) is not None:
        raise RuntimeError(f"device {device}: {obstacle}, or use device='cpu'")
    return device
