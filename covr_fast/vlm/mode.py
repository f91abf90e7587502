"""The modes of torch in which a prior and its tuner work, whatever modes the caller has set."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def own_mode(device: torch.device, *, grad: bool = False) -> Iterator[None]:
    """No inference mode, no autocast, autograd as `grad` says, and new tensors on the CPU.

    Tensors that are kept after a call are made in this mode, because later calls may come from other modes.
    The default dtype belongs to the whole process and cannot be set for a block, so code that depends on it
    names its dtype.

    Args:
        device: the device that computes.
    """
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.set_grad_enabled(grad))
        for kind in {"cpu", device.type}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            modes.enter_context(torch.device("cpu"))
        yield
