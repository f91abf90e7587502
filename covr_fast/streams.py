"""One CUDA stream per kind of work, and what waits for what. On a CPU all of this does nothing.

| lane   | work                                                    | priority |
| ------ | ------------------------------------------------------- | -------- |
| policy | the loop: sampling batches, acting, updates             | high     |
| prior  | the VLM's answers, and publishing its weights           | low      |
| tuner  | rounds of fine-tuning                                   | low      |

A lane is a stream. Its work starts after everything that its caller has queued so far, and the caller's later
work starts after the lane's work; both waits happen on the device. The host waits where it reads a number or
copies ordinary (not pinned) memory, and then only for the stream that it is on. Work that one thread starts
and another continues (a round, a background label) is handed over by an event: `mark` in the first thread,
`follow` or `work(after=...)` in the second. Every tensor that another stream reads is recorded on that
stream, so its memory is not reused before the read.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


def current_on(device: torch.device) -> AbstractContextManager[object]:
    """For a block in which `device` is the current CUDA device: kernels are launched on that one, wherever
    their tensors lie. Does nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Lane:
    """A CUDA stream for one kind of work. Kernels of an urgent lane are scheduled before those of others."""

    def __init__(self, device: torch.device, *, urgent: bool = False) -> None:
        self._device = device
        priority = -1 if urgent else 0  # lower numbers go first, 0 is the last
        self._stream = torch.cuda.Stream(device, priority=priority) if device.type == "cuda" else None

    @contextmanager
    def work(self, *inputs: Tensor | None, after: "torch.cuda.Event | None" = None) -> Iterator[None]:
        """Queues the work of the block on this lane. The caller's stream waits for it when the block ends.

        Args:
            inputs: tensors of other streams that the block reads.
            after: the `mark` that the lane waits for. None: it waits for all work of the caller's stream.
        """
        if self._stream is None:
            yield
            return
        caller = torch.cuda.current_stream(self._device)
        if after is None:
            self._stream.wait_stream(caller)
        else:
            self._stream.wait_event(after)
        for tensor in inputs:
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(self._stream)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            caller.wait_stream(self._stream)

    def synchronize(self) -> None:
        """The host waits for all work of the lane."""
        if self._stream is not None:
            self._stream.synchronize()


def mark(device: torch.device) -> "torch.cuda.Event | None":
    """An event after all work of the caller's stream so far, for another thread to wait for."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def follow(event: "torch.cuda.Event | None", device: torch.device) -> None:
    """The caller's stream waits for a `mark`."""
    if event is not None:
        torch.cuda.current_stream(device).wait_event(event)


def send(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of host memory on `device`. Its way there is queued on the caller's stream, by way of a copy
    in pinned memory, so that the host does not wait, and `values` may change as soon as the call returns."""
    if device.type != "cuda":
        return values.to(device)
    # Not `values.pin_memory()`, which is the same memory if it is pinned already.
    staged = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True).copy_(values)
    return staged.to(device, non_blocking=True)


class Fetch:
    """Tensors of the caller's stream on their way to the host. What is on the host already is not copied."""

    def __init__(self, *tensors: Tensor) -> None:
        on_device = [tensor.device for tensor in tensors if tensor.is_cuda]
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # into pinned memory
        self._arrival = mark(on_device[0]) if on_device else None
        self.waits = self._arrival is not None
        """Whether reading may have to wait for a device."""

    def read(self) -> list[Tensor]:
        """The tensors on the host, which waits until they have arrived, but not for later work."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._copies


def receive(*tensors: Tensor) -> None:
    """Records that the caller's stream reads these tensors of a lane, so that their memory waits for it."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
