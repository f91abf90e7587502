"""The modes of torch that a prior and its tuner work in, whatever their caller's are."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def own_mode(device: torch.device, *, grad: bool = False) -> Iterator[None]:
    """Ordinary tensors (no inference mode), autograd as `grad` says, no autocast, and new tensors on the CPU.

    What is kept beyond a call is made in this mode, because it is used in calls from other modes. The default
    dtype belongs to the whole process and cannot be set for a block: whatever depends on it names its dtype.

    Args:
        device: of the work.
    """
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.set_grad_enabled(grad))
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            modes.enter_context(torch.device("cpu"))
        yield
