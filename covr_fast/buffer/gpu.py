"""Buffers whose batches are made by a GPU.

What waits for what: `add` sends new frames on a stream of its own, after all gathers have read what they
replace; a gather, on the caller's current stream, comes after the last frames were sent and after the gather
before it, on whichever stream that was. The host waits in `add` only: until the frames of the add before have
left host memory (device storage), or until the last gather has read what is being overwritten (pinned
storage, where the CPU writes what the GPU reads).
"""

from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..border import CPU, address
from .observation import KeySpec
from .output import Form
from .storage import Storage


class DeviceGather:
    """Plans on the CPU, gathers on the GPU."""

    def __init__(self, device: torch.device, storage: Storage, keys: list[KeySpec], pinned: bool) -> None:
        self._device = device
        self._core = storage.core
        self._keys = keys
        self._pinned = pinned
        self._upload_stream = torch.cuda.Stream(device)
        self._sent = torch.cuda.Event()
        self._read = torch.cuda.Event()

    def before_add(self) -> None:
        (self._read if self._pinned else self._sent).synchronize()

    def after_add(self) -> None:
        if self._pinned:
            return
        self._upload_stream.wait_event(self._read)
        self._core.upload(self._upload_stream.cuda_stream)
        self._sent.record(self._upload_stream)

    def gather(self, request: Any, n: int, form: Form, obs: list[Tensor], next_obs: list[Tensor]) -> None:
        """Fills obs and, unless it is empty, next_obs, one tensor per key, for the drawn `request`."""
        self.begin_read()
        current = torch.cuda.current_stream(self._device).cuda_stream
        device = obs[0].device  # with its number, which that of the buffer may lack
        outputs = [form.addresses(out, device) for out in (obs, next_obs) if out]
        for k, target in enumerate(form.targets):
            plans = torch.empty(
                len(outputs), n, _C.stack_plan_bytes, dtype=torch.uint8, device=CPU, pin_memory=True
            )
            self._core.plan(k, request, address(plans, torch.uint8), bool(next_obs))
            on_device = plans.to(device, non_blocking=True)
            for plan, to in zip(on_device, outputs, strict=True):
                self._core.gather_cuda(k, address(plan, torch.uint8, device), n, target, to[k], current)
        self.end_read()

    def begin_read(self) -> None:
        """What the caller's current stream reads from here on has arrived."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._sent)
        current.wait_event(self._read)  # so that the one event tells of all reads, of other streams too

    def end_read(self) -> None:
        """What the caller's current stream has been told to read must not be replaced before it was."""
        self._read.record(torch.cuda.current_stream(self._device))


def check_device(device: torch.device, pinned: bool) -> None:
    """Says why a buffer cannot be on this device."""
    if device.type == "cpu" and not pinned:
        return
    if device.type != "cuda":
        raise ValueError(
            f"device is {device}, storage {'pinned' if pinned else 'device'}: pinned storage is for "
            "device='cuda', and buffers are made on 'cpu' or 'cuda'"
        )
    if not _C.with_cuda:
        raise RuntimeError("this build has no CUDA kernels: rebuild with nvcc on PATH and COVR_CUDA=ON")
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no CUDA device: use device='cpu'")
