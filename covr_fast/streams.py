"""Which CUDA stream a kind of work is queued on, and what waits for what. On a CPU all of it is nothing.

| lane   | work                                                    | priority |
| ------ | ------------------------------------------------------- | -------- |
| policy | the loop: sampling batches, acting, updates             | high     |
| prior  | the VLM's answers, and the publishing of its weights    | low      |
| tuner  | rounds of fine-tuning                                   | low      |

A lane begins behind what its caller has queued so far, and its caller goes on behind what the lane was given;
both waits happen on the device. The host waits where it reads a number or sends ordinary (not pinned) memory,
and then for the lane it is in. What one thread starts and another continues (a round, a background label) is
handed over by an event: `mark` in the first, `follow` or `work(after=...)` in the second. Memory that another
stream still reads is not given to anybody else, because every tensor that changes lanes is recorded on its
reader's stream.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Lane:
    """A CUDA stream for one kind of work.

    Args:
        device: of the work; on a CPU a lane does nothing.
        urgent: kernels of this lane are scheduled before those of others.
    """

    def __init__(self, device: torch.device, *, urgent: bool = False) -> None:
        self._device = device
        priority = -1 if urgent else 0  # lower numbers go first, 0 is the last
        self._stream = torch.cuda.Stream(device, priority=priority) if device.type == "cuda" else None

    @contextmanager
    def work(self, *inputs: Tensor | None, after: "torch.cuda.Event | None" = None) -> Iterator[None]:
        """The block's work is queued on this lane, and the caller's stream waits for it when the block ends.

        Args:
            inputs: tensors of other streams that the block reads.
            after: the `mark` that the lane waits for. None: for all of the caller's stream.
        """
        if self._stream is None:
            yield
            return
        caller = torch.cuda.current_stream(self._device)
        if after is None:
            self._stream.wait_stream(caller)
        else:
            self._stream.wait_event(after)
        _record(inputs, self._stream)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            caller.wait_stream(self._stream)

    def synchronize(self) -> None:
        """The host waits for all that the lane was given."""
        if self._stream is not None:
            self._stream.synchronize()


def mark(device: torch.device) -> "torch.cuda.Event | None":
    """What the caller's stream holds so far, for another thread to wait for."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def follow(event: "torch.cuda.Event | None", device: torch.device) -> None:
    """The caller's stream goes on behind a `mark`."""
    if event is not None:
        torch.cuda.current_stream(device).wait_event(event)


def receive(*tensors: Tensor) -> None:
    """The caller's stream reads these, which were made in a lane: their memory waits for it."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


def _record(tensors: tuple[Tensor | None, ...], stream: torch.cuda.Stream) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.is_cuda:
            tensor.record_stream(stream)
