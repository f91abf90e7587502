"""The memory of the prioritized sampler."""

import torch
from torch import Tensor

from .. import _C
from .mirror import Mirror


class PriorityTree:
    """The priorities' memory, one per row of the buffer, where the buffer's bookkeeping is done: an
    `ops.SumTree`, what was largest so far, and which transitions have one. csrc/replay/priorities.h and
    kernels/cuda/priorities.cu work on it."""

    def __init__(self, rows: int, num_envs: int, alpha: float, device: torch.device) -> None:
        from ..ops import SumTree  # which need not be loaded for other samplers

        self._alpha = alpha
        self._device = device
        self._tree = SumTree(rows, device)
        self._leaves, self._sums, self._claims = self._tree.memory
        self._largest = torch.ones(1, dtype=torch.float64, device=device)
        self._bounds = torch.zeros(2, num_envs, dtype=torch.int64, device=device)
        if device.type == "cpu":
            for tensor in (self._leaves, self._sums):
                _C.prefer_huge_pages(tensor)

    def connect(self, owner: _C.Replay | Mirror) -> None:
        """From here on `owner` draws in proportion to these priorities."""
        if isinstance(owner, Mirror):
            owner.core.prioritize(
                self._leaves, self._sums, self._claims, self._largest, self._bounds, self._alpha
            )
        else:
            owner.prioritize(self._leaves, self._sums, self._largest, self._bounds, self._alpha)

    @property
    def nbytes(self) -> int:
        return self._leaves.nbytes + self._sums.nbytes + self._claims.nbytes

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "priority.priorities": self._leaves,
            "priority.largest": self._largest,
            "priority.bounds": self._bounds,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._largest.copy_(state["priority.largest"])
        self._bounds.copy_(state["priority.bounds"])
        rows = torch.arange(len(self._leaves), dtype=torch.int64, device=self._device)
        self._tree.update(rows, state["priority.priorities"].to(self._device, torch.float32))
