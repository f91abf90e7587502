# The C++ and CUDA kernels. A tensor that a function cannot read is a TypeError: see csrc/common/border.h.
# Objects do not keep the tensors alive that they were given: the caller does.
# tests/test_border.py compares the names here with those of the extension.
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

with_cuda: bool
cuda_architectures: str
"""What the CUDA kernels were compiled for, in CMake's syntax: "80-real,90". Empty without CUDA."""

# ---- operations ----

def cross_entropy_reduce(
    losses: Tensor,
    normaliser: Tensor,
    logits: Tensor,
    labels: Tensor,
    scale: Tensor,
    smoothing: float,
    threads: int,
) -> None: ...
def cross_entropy_gradient(
    out: Tensor,
    normaliser: Tensor,
    upstream: float,
    logits: Tensor,
    labels: Tensor,
    scale: Tensor,
    smoothing: float,
    threads: int,
) -> None: ...
def discounted_returns(out: Tensor, rewards: Tensor, ends: Tensor, gamma: float, threads: int) -> None: ...
def horizon_returns(
    out: Tensor, rewards: Tensor, ends: Tensor, gamma: float, horizon: int, threads: int
) -> None: ...
def exploration_threshold(returns: Tensor, scale: float, statistics: Tensor, threads: int) -> int: ...
def indices_above(returns: Tensor, cutoff: float, indices: Tensor, threads: int) -> None: ...
def return_weights(out: Tensor, returns: Tensor) -> None: ...
def sum_tree_inner_nodes(capacity: int) -> int: ...
def sum_tree_update(leaves: Tensor, sums: Tensor, indices: Tensor, priorities: Tensor) -> None: ...
def sum_tree_sample(
    leaves: Tensor, sums: Tensor, jitter: Tensor, indices: Tensor, probabilities: Tensor
) -> None: ...
def window(out: Tensor, frames: Tensor, offsets: Tensor, pad: int, threads: int) -> None: ...

# ---- the same on a GPU, in builds with CUDA: `stream` is the handle of a CUDA stream ----

def discounted_returns_workspace(steps: int, columns: int) -> int: ...
def discounted_returns_cuda(
    out: Tensor, rewards: Tensor, ends: Tensor, gamma: float, workspace: Tensor, stream: int
) -> None: ...
def horizon_returns_cuda(
    out: Tensor, rewards: Tensor, ends: Tensor, gamma: float, horizon: int, stream: int
) -> None: ...
def exploration_filter_workspace(n: int) -> int: ...
def exploration_filter_cuda(
    returns: Tensor,
    scale: Tensor,
    indices: Tensor,
    kept: Tensor,
    statistics: Tensor,
    workspace: Tensor,
    stream: int,
) -> None: ...
def return_weights_cuda(out: Tensor, returns: Tensor, extremes: Tensor, stream: int) -> None: ...
def sum_tree_update_cuda(
    leaves: Tensor, sums: Tensor, claims: Tensor, indices: Tensor, priorities: Tensor, stream: int
) -> None: ...
def sum_tree_sample_cuda(
    leaves: Tensor, sums: Tensor, jitter: Tensor, indices: Tensor, probabilities: Tensor, stream: int
) -> None: ...
def window_cuda(out: Tensor, frames: Tensor, offsets: Tensor, pad: int, stream: int) -> None: ...

# ---- memory ----

class OutputPool:
    def __init__(self, idle_bytes: int = ...) -> None: ...
    def take(self, bytes: int) -> NDArray[np.uint8]: ...
    def release(self) -> None: ...
    @property
    def idle(self) -> int: ...

def prefer_huge_pages(tensor: Tensor) -> None: ...
def pinned_array_cuda(bytes: int) -> NDArray[np.uint8]: ...

# ---- the replay buffer: see csrc/replay/replay.h ----

stack_plan_bytes: int
nothing_to_sample: str

def all_within(array: NDArray[np.floating], limit: float) -> bool: ...

class FrameStackError(ValueError): ...

class Recency:
    @overload
    def __init__(self) -> None: ...
    @overload
    def __init__(self, recency: float, floor: int) -> None: ...

class GatherTarget:
    def __init__(self, channels_last: bool, shifted: bool, black: bool, height: int, width: int) -> None: ...

class ObservationsOut:
    def __init__(self, ids: Tensor) -> None: ...
    def add_key(self, target: GatherTarget, obs: Tensor, next_obs: Tensor | None) -> None: ...

class BatchOut(ObservationsOut):
    def __init__(
        self,
        ids: Tensor,
        n_step: int,
        reward: Tensor,
        discount: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        weight: Tensor,
        columns: list[Tensor],
        obs_offset: Tensor | None,
        next_obs_offset: Tensor | None,
        offset_range: int,
        shift_origin: int,
        translate: bool,
    ) -> None: ...

class Lock:
    def __enter__(self) -> Lock: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.int64]: ...
    def ids_in_rows(self, rows: NDArray[np.int64]) -> NDArray[np.int64]: ...

class Replay:
    cut_at_jumps: bool
    def __init__(
        self,
        capacity: int,
        num_envs: int,
        n_step: int,
        gamma: float,
        count: Tensor,
        first: Tensor,
        ended: Tensor,
        reward: Tensor,
        flags: Tensor,
        time: Tensor,
    ) -> None: ...
    def add_key(
        self,
        name: str,
        frames: Tensor,
        recent: Tensor,
        stack: int,
        channels: int,
        height: int,
        width: int,
        channels_last: bool,
        written: Tensor,
        newest: Tensor,
        depth: Tensor,
    ) -> None: ...
    def add_column(self, name: str, values: Tensor) -> None: ...
    def prioritize(
        self, leaves: Tensor, sums: Tensor, largest: Tensor, bounds: Tensor, alpha: float
    ) -> None: ...
    def set_priorities(self, ids: NDArray[np.int64], priority: NDArray[np.float64]) -> None: ...
    def add(
        self,
        obs: Sequence[NDArray[np.generic]],
        next_obs: Sequence[NDArray[np.generic]],
        reward: NDArray[np.float32],
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
        columns: Sequence[NDArray[np.generic]],
        env_ids: NDArray[np.int64] | None,
        take_block: Callable[[int], Tensor] | None = None,
    ) -> NDArray[np.int64]: ...
    def follow(self, block: Tensor, rows: int) -> None: ...
    def cut(self, env_ids: NDArray[np.int64] | None) -> None: ...
    @property
    def rows_added(self) -> int: ...
    @property
    def jumps(self) -> int: ...
    def size(self) -> int: ...
    def samplable(self) -> int: ...
    def reading(self) -> Lock: ...
    def writing(self) -> Lock: ...
    def sample(self, out: BatchOut, seed: int, batch: int, recency: Recency, threads: int) -> None: ...
    def sample_prioritized(self, out: BatchOut, seed: int, batch: int, beta: float, threads: int) -> None: ...
    def get(self, out: BatchOut, seed: int, batch: int, threads: int) -> None: ...
    def observe(self, out: ObservationsOut, threads: int) -> None: ...

class CudaObservationsOut:
    def __init__(self, ids: Tensor) -> None: ...
    def add_key(self, target: GatherTarget, obs: Tensor, next_obs: Tensor | None) -> None: ...

class CudaBatchOut(CudaObservationsOut):
    def __init__(
        self,
        ids: Tensor,
        n_step: int,
        reward: Tensor,
        discount: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        weight: Tensor,
        columns: list[Tensor],
        obs_offset: Tensor | None,
        next_obs_offset: Tensor | None,
        offset_range: int,
        shift_origin: int,
        translate: bool,
    ) -> None: ...

class CudaMirror:
    """See csrc/replay/mirror.h."""

    def __init__(
        self,
        host: Replay,
        streams: Tensor,
        reward: Tensor,
        flags: Tensor,
        time: Tensor,
        newest: list[Tensor],
        depth: list[Tensor],
        columns: list[Tensor],
        sequence: Tensor,
    ) -> None: ...
    def prioritize(
        self, leaves: Tensor, sums: Tensor, claims: Tensor, largest: Tensor, bounds: Tensor, alpha: float
    ) -> None: ...
    def sample(self, out: CudaBatchOut, recency: Recency, plans: Tensor, stream: int) -> None: ...
    def get(self, out: CudaBatchOut, plans: Tensor, stream: int) -> None: ...
    def observe(self, out: CudaObservationsOut, plans: Tensor, stream: int) -> None: ...
    def follow(self, stream: int) -> None: ...
    def set_priorities(
        self, ids: Tensor, priority: Tensor, rows: Tensor, leaves: Tensor, stream: int
    ) -> None: ...

class CudaAdd:
    """See csrc/replay/device_add.h."""

    max_keys: int
    max_columns: int
    def __init__(self, host: Replay, mirror: CudaMirror, descriptors: Tensor, claims: Tensor) -> None: ...
    @staticmethod
    def descriptor_bytes(host: Replay) -> int: ...
    @staticmethod
    def inspections(host: Replay) -> int: ...
    def block_bytes(self, rows: int) -> int: ...
    def describe(self, stream: int) -> None: ...
    def apply(self, block: Tensor, on_device: Tensor, rows: int, bytes: int, stream: int) -> None: ...
    def add(
        self,
        obs: list[Tensor],
        next_obs: list[Tensor],
        reward: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        columns: list[Tensor],
        env_ids: Tensor | None,
        findings: Tensor,
        on_device: Tensor,
        block: Tensor,
        ids: Tensor,
        stream: int,
    ) -> None: ...
