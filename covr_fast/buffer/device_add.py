"""How rows reach a buffer on a GPU.

Rows of host memory are decided by the CPU, as on a buffer there. Everything that they change, their new
frames included, goes to the device as one block, in one copy, from pinned memory; a kernel applies it.

Rows of device memory are decided and added by kernels, and nothing waits for them. Their records, without
frames, come back in a block of pinned memory; the host's tables follow when someone asks for them (`drain`),
or when the device is done with them anyway.

What waits for what: the host waits, in `from_host`, until the device has the block of the add before last,
and for all blocks that come back; in `from_device` only if a whole queue of blocks is on its way. The order
on the device is up to the caller: see gpu.py.
"""

from collections import deque
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..streams import current_on
from .device_arguments import DeviceRows
from .output import HostRows
from .storage import Storage

_MOST_ON_THEIR_WAY = 16  # blocks that come back


class _PinnedBlock:
    """Pinned memory that grows, and an event after which the device does not use it any more."""

    def __init__(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.done: Any = torch.cuda.Event()
        self.rows = 0

    def grow(self, nbytes: int) -> Tensor:
        if len(self.bytes) < nbytes:
            self.bytes = torch.empty(nbytes * 3 // 2, dtype=torch.uint8, device="cpu", pin_memory=True)
        return self.bytes


class DeviceAdd:
    """The part of a buffer on a GPU that adds. It locks nothing: one call at a time.

    Args:
        storage, mirror: the tables in host and in device memory.
    """

    def __init__(self, storage: Storage, mirror: "_C.CudaMirror", device: torch.device) -> None:
        self._device = device
        self._storage = storage
        self._core = core = storage.core
        self._recent_is_old = False
        size = _C.CudaAdd.descriptor_bytes(core)
        self._descriptors = torch.empty(size, dtype=torch.uint8, device=device)
        self._claims = torch.zeros(storage.num_envs, dtype=torch.int32, device=device)
        self._cuda = _C.CudaAdd(core, mirror, self._descriptors, self._claims)
        with current_on(device):
            self._cuda.describe(torch.cuda.current_stream(device).cuda_stream)
        self._inspections = _C.CudaAdd.inspections(core)
        self._going = _PinnedBlock(), _PinnedBlock()
        self._coming: deque[_PinnedBlock] = deque()
        self._spare: list[_PinnedBlock] = []
        self._on_device = torch.empty(0, dtype=torch.uint8, device=device)
        self._findings = torch.empty(0, dtype=torch.uint32, device=device)

    def from_host(self, rows: HostRows, stream: Any) -> Any:
        """Adds the arguments of `_C.Replay.add` on a stream. Returns their ids, an array int64 [rows]."""
        self.drain()
        if self._recent_is_old:
            self._storage.restore_recent()  # it waits for the device
            self._recent_is_old = False
        block = self._going[0]
        block.done.synchronize()
        needed = 0

        def take(nbytes: int) -> Tensor:
            nonlocal needed
            needed = nbytes
            self._reserve(nbytes, stream)  # before anything is written, because there may be no room
            return block.grow(nbytes)

        ids = self._core.add(*rows, take_block=take)
        self._cuda.apply(block.bytes, self._on_device, len(ids), needed, stream.cuda_stream)
        block.done.record(stream)
        self._going = self._going[1], block
        return ids

    def from_device(self, rows: DeviceRows) -> Tensor:
        """Adds rows on the caller's current stream, which the host does not wait for. Returns their ids,
        int64 [rows] on the device, -1 if they are refused.

        Raises:
            ValueError: an earlier call was refused, and its block has come back. These rows are not added.
        """
        while self._coming and (self._coming[0].done.query() or len(self._coming) >= _MOST_ON_THEIR_WAY):
            self._follow()
        stream = torch.cuda.current_stream(self._device)
        n = len(rows.reward)
        nbytes = self._cuda.block_bytes(n)
        self._reserve(nbytes, stream, n * self._inspections)
        block = self._spare.pop() if self._spare else _PinnedBlock()
        block.grow(nbytes)
        block.rows = n
        ids = torch.empty(n, dtype=torch.int64, device=self._device)
        self._cuda.add(*rows, self._findings, self._on_device, block.bytes, ids, stream.cuda_stream)
        block.done.record(stream)
        self._coming.append(block)
        self._recent_is_old = True
        return ids

    def drain(self) -> None:
        """The host's tables follow everything that was added. The host waits for the device.

        Raises:
            FrameStackError, ValueError: a call was refused, as `add` refuses rows of the host. The next
                `drain` goes on with the calls after it.
        """
        while self._coming:
            self._follow()

    def _follow(self) -> None:
        block = self._coming.popleft()
        self._spare.append(block)
        block.done.synchronize()
        self._core.follow(block.bytes, block.rows)

    def _reserve(self, nbytes: int, stream: Any, findings: int = 0) -> None:
        """Device memory for a block and for findings, to be used on `stream`."""
        with torch.cuda.stream(stream):
            if len(self._on_device) < nbytes:
                self._on_device = torch.empty(nbytes * 3 // 2, dtype=torch.uint8, device=self._device)
            if len(self._findings) < findings:
                self._findings = torch.empty(findings, dtype=torch.uint32, device=self._device)
        for memory in self._on_device, self._findings:
            memory.record_stream(stream)  # when it is replaced, others get it after this use
