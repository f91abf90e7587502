"""The bookkeeping of a buffer in device memory, from which kernels draw and plan batches."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from .. import _C
from ..streams import send
from .device_add import DeviceAdd
from .storage import Storage

_NEXT, _BETA = 1, 3  # in the sequence: see csrc/replay/mirror.h


class Mirror:
    """Copies of a storage's tables, without the frames, on a device.

    Everything here is queued on the caller's current stream, and nothing makes the host wait, but for
    `sync_all`. gpu.py says what waits for what. The host's tables are sent by way of pinned memory, so they
    may change as soon as a call returns.

    Attributes:
        tensors: per row of transitions, by the names of `storage.tensors`.
        streams: int64 [3 + keys, num_envs]: count, first, ended and, of each key, written.
        core: the C++ object that works on them.
        adding: what adds rows to them.
    """

    def __init__(self, storage: Storage, device: torch.device) -> None:
        self._storage = storage
        self._device = device
        keys = [key.name for key in storage.keys]
        columns = [name for name in storage.tensors if name.startswith("column.")]
        of_rows = [
            "reward",
            "flags",
            "time",
            *(f"{kind}.{key}" for key in keys for kind in ("newest", "depth")),
        ]
        self.streams = torch.zeros_like(storage.streams, device=device)
        self.tensors = {
            name: torch.zeros_like(storage.tensors[name], device=device) for name in (*of_rows, *columns)
        }
        self._sequence = torch.zeros(4, dtype=torch.int64, device=device)
        self._said: tuple[int, int, float] | None = None  # what the device's sequence will be
        self.core = _C.CudaMirror(
            host=storage.core,
            streams=self.streams,
            reward=self.tensors["reward"],
            flags=self.tensors["flags"],
            time=self.tensors["time"],
            newest=[self.tensors[f"newest.{key}"] for key in keys],
            depth=[self.tensors[f"depth.{key}"] for key in keys],
            columns=[self.tensors[name] for name in columns],
            sequence=self._sequence,
        )
        self.adding = DeviceAdd(storage, self.core, device)

    @property
    def nbytes(self) -> int:
        return self.streams.nbytes + sum(tensor.nbytes for tensor in self.tensors.values())

    # ---- following the host ----

    def sync_rows(self, rows: np.ndarray, names: Iterable[str] | None = None) -> None:
        """Sends these rows int64 [n] of the named tensors, or of all."""
        at = self.send(torch.from_numpy(rows))
        for name in self.tensors if names is None else names:
            own = _row_bytes(self.tensors[name])
            if own.shape[1]:
                own[at] = self.send(_row_bytes(self._storage.tensors[name])[rows])

    def sync_streams(self) -> None:
        self.streams.copy_(self._storage.streams.pin_memory(), non_blocking=True)

    def sync_all(self) -> None:
        """After the host's tables were replaced. The host waits."""
        self.streams.copy_(self._storage.streams)
        for name, own in self.tensors.items():
            own.copy_(self._storage.tensors[name])

    def send(self, values: Tensor) -> Tensor:
        """Values from host memory."""
        return send(values, self._device)

    def follow(self) -> None:
        """After the tables changed: new transitions get the largest priority."""
        self.core.follow(self.stream)

    def set_priorities(self, ids: Tensor, priority: Tensor) -> None:
        """int64 [n] and float32 [n] of the device. What the CPU would refuse is skipped."""
        rows, leaves = torch.empty_like(ids), torch.empty_like(priority)
        self.core.set_priorities(ids, priority, rows, leaves, self.stream)

    # ---- drawing ----

    def plans(self, n: int, with_next: bool) -> Tensor:
        """Memory in which kernels plan the observations of n rows."""
        shape = len(self._storage.keys), 2 if with_next else 1, n, _C.stack_plan_bytes
        return torch.empty(shape, dtype=torch.uint8, device=self._device)

    @property
    def stream(self) -> int:
        """The handle of the caller's current stream."""
        handle: int = torch.cuda.current_stream(self._device).cuda_stream
        return handle

    def expect(self, seed: int, number: int, beta: float) -> None:
        """The next batch that is drawn has this number of this seed. Each kernel that draws one counts on, so
        in a row of draws this sends nothing."""
        said = self._said
        if said is None or said[0] != seed:
            self._sequence[0].fill_(seed)
        if said is None or said[1] != number:
            self._sequence[_NEXT].fill_(number)
        if said is None or said[2] != beta:
            self._sequence.view(torch.float64)[_BETA].fill_(beta)
        self._said = seed, number, beta

    def drawn(self) -> None:
        """One batch was drawn."""
        if self._said is not None:
            seed, number, beta = self._said
            self._said = seed, number + 1, beta

    def lost_count(self) -> None:
        """Whether a batch was drawn is not known, because a launch failed."""
        self._said = None


def _row_bytes(tensor: Tensor) -> Tensor:
    """The tensor [rows, ...] as uint8 [rows, bytes]: torch cannot index all dtypes on a device."""
    flat = tensor.view(len(tensor), math.prod(tensor.shape[1:]))
    return flat.view(torch.uint8)
