"""Whether a contestant trains what it should: nothing is timed before."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def parameters(modules: Iterable[nn.Module]) -> int:
    """Weights of these modules, each counted once."""
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def operations(function: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions in a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


class Seen:
    """Observations that the environments gave, to find out whether a buffer gives them back."""

    def __init__(self) -> None:
        self._known: set[int] = set()

    def add(self, obs: np.ndarray) -> None:
        """uint8[n, C, H, W]"""
        self._known.update(_hashes(obs))

    def check(self, obs: Tensor) -> None:
        """Raises an AssertionError for an observation uint8[n, C, H, W] that was never added."""
        strange = sum(value not in self._known for value in _hashes(obs.numpy()))
        if strange:
            raise AssertionError(f"{strange} of {len(obs)} sampled observations are of no environment")
        if len(set(_hashes(obs.numpy()))) < len(obs) // 4:
            raise AssertionError("the environments show nearly the same picture always")


def _hashes(obs: np.ndarray) -> Iterator[int]:
    return (hash(each.tobytes()) for each in np.ascontiguousarray(obs))


def check_updates(updates: int, decisions: int, decisions_per_update: int, slack: int) -> None:
    """Raises an AssertionError if there were not as many updates as asked for, `slack` decisions or less."""
    missing = decisions - updates * decisions_per_update
    if not 0 <= missing <= slack:
        raise AssertionError(
            f"{updates} updates after {decisions} decisions: {missing} decisions without an update"
        )


def check_finite(*modules: nn.Module) -> None:
    """Raises an AssertionError for a weight that is not finite."""
    if not all(bool(torch.isfinite(p).all()) for module in modules for p in module.parameters()):
        raise AssertionError("weights are not finite")
