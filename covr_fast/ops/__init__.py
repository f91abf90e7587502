"""Pure functions on tensors: returns, the exploration filter, weights and losses, frame shifts, a sum tree.

Each takes `backend="auto"`, which runs the fastest implementation for the tensors' device; `"reference"` is
the plain-torch truth in `covr_fast.ops.reference`. See docs/kernels.md for formulas and floors.
"""

from ._memory import release_memory
from .filter import (
    ExplorationFilter,
    PaddedExplorationFilter,
    exploration_filter,
    exploration_filter_padded,
)
from .frames import random_crop, random_shift
from .loss import return_weighted_cross_entropy, return_weighted_linear_cross_entropy
from .returns import discounted_returns
from .sum_tree import SumTree
from .weights import return_weights

__all__ = [
    "ExplorationFilter",
    "PaddedExplorationFilter",
    "SumTree",
    "discounted_returns",
    "exploration_filter",
    "exploration_filter_padded",
    "random_crop",
    "random_shift",
    "release_memory",
    "return_weighted_cross_entropy",
    "return_weighted_linear_cross_entropy",
    "return_weights",
]
