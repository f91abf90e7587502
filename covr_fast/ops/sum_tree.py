"""A sum tree over priorities: draws in proportion to them, updates in logarithmic time."""

import torch
from torch import Tensor

from .. import _C
from . import reference
from ._backend import Backend, fake, launch, operator, select


class SumTree:
    """Draws `torch.multinomial(priorities / priorities.sum(), B)` in O(log capacity), and keeps it current.

    Leaves are float32 priorities; each inner node is the float64 sum of 32 children, recomputed from them
    whenever one changes, so rounding errors do not build up.

    Args:
        capacity: number of leaves; all priorities start at 0, and a leaf of priority 0 is never drawn.
        device: where the tree lives. Indices and priorities are given there, draws come back there.
        backend: "auto", "reference", "cpp" or "cuda".
    """

    def __init__(
        self, capacity: int, device: torch.device | str = "cpu", *, backend: Backend = "auto"
    ) -> None:
        if capacity < 1:
            raise ValueError(f"SumTree: capacity must be at least 1, not {capacity}")
        self._capacity = capacity
        leaves = torch.zeros(capacity, dtype=torch.float32, device=device)
        chosen = select("SumTree", backend, leaves, ("cpp", "cuda"), (torch.float32,))
        self._reference = reference.SumTree(capacity, leaves.device) if chosen == "reference" else None
        self._leaves = leaves if self._reference is None else self._reference.leaves
        inner_nodes = _C.sum_tree_inner_nodes(capacity)
        self._sums = torch.zeros(inner_nodes, dtype=torch.float64, device=device)
        # Where the entries of a batch settle which of several for one leaf is the last.
        claims = capacity if chosen == "cuda" else 0
        self._claims = torch.zeros(claims, dtype=torch.int32, device=device)

    def __len__(self) -> int:
        return self._capacity

    @property
    def device(self) -> torch.device:
        return self._leaves.device

    @property
    def memory(self) -> tuple[Tensor, Tensor, Tensor]:
        """(leaves, sums, claims), for C++ that works on this tree: see csrc/ops/sum_tree.h."""
        return self._leaves, self._sums, self._claims

    @property
    def priorities(self) -> Tensor:
        """float32 [capacity], a copy; `update(torch.arange(capacity), priorities)` restores it."""
        return self._leaves.clone()

    @property
    def total(self) -> float:
        """Sum of all priorities. On a CUDA device this waits for the tree's pending updates."""
        root = self._sums[-1] if self._reference is None else self._reference.total()
        return float(root)

    def update(self, indices: Tensor, priorities: Tensor) -> None:
        """Sets `priorities` [B] at `indices` int64 [B]; of duplicate indices the last counts.

        Priorities are finite and not negative. On the CPU anything else, and an index out of range, is a
        ValueError and changes nothing; a CUDA device skips such an entry, since raising would mean waiting
        for it.
        """
        if indices.ndim != 1 or indices.dtype != torch.int64:
            raise ValueError(f"SumTree: indices must be int64 [B], not {indices.dtype} {list(indices.shape)}")
        if priorities.shape != indices.shape or not priorities.is_floating_point():
            raise ValueError(
                f"SumTree: priorities must be floating {list(indices.shape)} like indices, "
                f"not {priorities.dtype} {list(priorities.shape)}"
            )
        for name, tensor in (("indices", indices), ("priorities", priorities)):
            if tensor.device != self.device:
                raise ValueError(f"SumTree: {name} are on {tensor.device}, the tree is on {self.device}")
        priorities = priorities.detach().to(torch.float32)
        if self._reference is None:
            torch.ops.covr_fast.sum_tree_update(self._leaves, self._sums, self._claims, indices, priorities)
        else:
            self._reference.update(indices, priorities)

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draws with replacement: int64 [batch_size] leaves and their float64 probabilities.

        Stratified as in prioritized replay (Schaul et al. 2016): draw i falls into the i-th of batch_size
        equal slices of the total. Each leaf is expected `batch_size * probability` times, with less variance
        than independent draws, and the leaves come out in ascending order.

        Raises:
            ValueError: batch_size < 1, or on the CPU a tree whose priorities are all zero. A CUDA device
                draws leaf 0 with probability 0 from such a tree.
        """
        if batch_size < 1:
            raise ValueError(f"SumTree: batch_size must be at least 1, not {batch_size}")
        if self.device.type == "cpu" and not self.total > 0:
            raise ValueError("SumTree: all priorities are zero, so there is nothing to draw; update() first")
        jitter = torch.rand(batch_size, dtype=torch.float64, device=self.device, generator=generator)
        if self._reference is None:
            drawn: tuple[Tensor, Tensor] = torch.ops.covr_fast.sum_tree_sample(
                self._leaves, self._sums, jitter
            )
            return drawn
        strata = torch.arange(batch_size, dtype=torch.float64, device=self.device)
        return self._reference.descend((strata + jitter) / batch_size)


@operator(
    "sum_tree_update(Tensor(a!) leaves, Tensor(b!) sums, Tensor(c!) claims, Tensor indices, "
    "Tensor priorities) -> ()"
)
def _update(leaves: Tensor, sums: Tensor, claims: Tensor, indices: Tensor, priorities: Tensor) -> None:
    indices, priorities = indices.contiguous(), priorities.contiguous()
    tree = (leaves, sums, claims) if leaves.is_cuda else (leaves, sums)
    launch("sum_tree_update", *tree, indices, priorities)


@operator("sum_tree_sample(Tensor leaves, Tensor sums, Tensor jitter) -> (Tensor, Tensor)")
def _sample(leaves: Tensor, sums: Tensor, jitter: Tensor) -> tuple[Tensor, Tensor]:
    jitter = jitter.contiguous()
    indices, probabilities = torch.empty_like(jitter, dtype=torch.int64), torch.empty_like(jitter)
    launch("sum_tree_sample", leaves, sums, jitter, indices, probabilities)
    return indices, probabilities


@fake("sum_tree_update")
def _fake_update(*_: Tensor) -> None:
    return None


@fake("sum_tree_sample")
def _fake_sample(leaves: Tensor, sums: Tensor, jitter: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(jitter, dtype=torch.int64), torch.empty_like(jitter)
