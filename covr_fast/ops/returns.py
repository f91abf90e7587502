"""Discounted return-to-go within episodes."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import reference
from ._backend import Backend, check_floating, check_same_device, fake, launch, library, operator, select
from ._memory import empty

_DTYPES = (torch.float32, torch.float64)


def discounted_returns(
    rewards: Tensor,
    ends: Tensor,
    gamma: float,
    *,
    horizon: int | None = None,
    bootstrap: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """`for t in reversed(range(T)): g[t] = r[t] + gamma * torch.where(ends[t], 0, g[t + 1])`, `g[T] = 0`.

    The return of COVR's filter, `g_t = sum_k gamma^(k-t) r_k` up to the end of the trajectory (Xia et al.
    2026, sec. EDDF). The tail after a column's last end is treated as ending at T - 1.

    Args:
        rewards: [T, N] of a floating dtype; N independent columns (environments) of T steps.
        ends: bool [T, N]; true at the last step of an episode.
        gamma: discount per step, in [0, 1].
        horizon: sum over at most this many steps, at least 1; None: up to the end of the episode. The time
            that it takes grows with min(horizon, longest episode).
        bootstrap: floating [T, N], the value V(s[t+1]) of what follows step t. It is read where an episode
            ends, and in the last row: there gamma * bootstrap is added to the reward. Zero where nothing
            follows (a termination); elsewhere it may hold anything. A sum that the horizon cuts before the
            end of the episode gets no value. None: zeros.
        backend: "auto", "reference", "cpp" or "cuda". Half-precision rewards are summed in float32.

    Returns:
        [T, N] of the rewards' dtype; differentiable in `rewards` and `bootstrap`. The result does not depend
        on the number of threads; over a horizon, every backend gives the same bits for float32 rewards.

    Raises:
        ValueError: an argument of another shape, dtype or device, or a number out of its range.
    """
    name = "discounted_returns"
    check_floating(name, "rewards", rewards, "[T, N]")
    if ends.shape != rewards.shape or ends.dtype != torch.bool:
        raise ValueError(
            f"{name}: ends must be bool {list(rewards.shape)} like rewards, "
            f"not {ends.dtype} {list(ends.shape)}"
        )
    if not (math.isfinite(gamma) and 0.0 <= gamma <= 1.0):
        raise ValueError(f"{name}: gamma must be in [0, 1], not {gamma}")
    if horizon is not None and horizon < 1:
        raise ValueError(f"{name}: horizon must be at least 1, or None for whole episodes, not {horizon}")
    check_same_device(name, rewards=rewards, ends=ends)
    wide = rewards if rewards.dtype in _DTYPES else rewards.float()
    if bootstrap is not None:
        _check_bootstrap(name, bootstrap, rewards)
        bootstrap = bootstrap.to(wide.dtype)
    if select(name, backend, wide, ("cpp", "cuda"), _DTYPES) == "reference":
        result = reference.discounted_returns(wide, ends, gamma, horizon, bootstrap)
    else:
        if bootstrap is not None:
            wide = torch.where(_last_steps(ends), wide + gamma * bootstrap, wide)
        if horizon is None:
            result = torch.ops.covr_fast.discounted_returns(wide, ends, gamma)
        else:
            result = torch.ops.covr_fast.horizon_returns(wide, ends, gamma, horizon)
    return result.to(rewards.dtype)


def _check_bootstrap(name: str, bootstrap: Tensor, rewards: Tensor) -> None:
    if bootstrap.shape != rewards.shape or not bootstrap.is_floating_point():
        raise ValueError(
            f"{name}: bootstrap must be floating {list(rewards.shape)} like rewards, "
            f"not {bootstrap.dtype} {list(bootstrap.shape)}"
        )
    check_same_device(name, rewards=rewards, bootstrap=bootstrap)


def _last_steps(ends: Tensor) -> Tensor:
    """bool [T, N]: the ends, and the last row."""
    last = ends.clone()
    last[-1:] = True
    return last


def _first_steps(ends: Tensor) -> Tensor:
    """bool [T, N]: the first row, and where an episode ended one step before."""
    first = torch.ones_like(ends)
    first[1:] = ends[:-1]
    return first


@operator("discounted_returns(Tensor rewards, Tensor ends, float gamma) -> Tensor")
def _run(rewards: Tensor, ends: Tensor, gamma: float) -> Tensor:
    rewards, ends = rewards.contiguous(), ends.contiguous()
    result = empty(rewards.shape, rewards.dtype, rewards.device)
    if rewards.is_cuda:
        workspace = rewards.new_empty(_C.discounted_returns_workspace(*rewards.shape))
        launch("discounted_returns", result, rewards, ends, gamma, workspace)
    else:
        launch("discounted_returns", result, rewards, ends, gamma, torch.get_num_threads())
    return result


@fake("discounted_returns")
def _fake(rewards: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(rewards, memory_format=torch.contiguous_format)


@operator("horizon_returns(Tensor rewards, Tensor ends, float gamma, int horizon) -> Tensor")
def _run_horizon(rewards: Tensor, ends: Tensor, gamma: float, horizon: int) -> Tensor:
    rewards, ends = rewards.contiguous(), ends.contiguous()
    result = empty(rewards.shape, rewards.dtype, rewards.device)
    threads = () if rewards.is_cuda else (torch.get_num_threads(),)
    launch("horizon_returns", result, rewards, ends, gamma, horizon, *threads)
    return result


fake("horizon_returns")(_fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, ends, *numbers = inputs
    ctx.save_for_backward(ends)
    ctx.numbers = numbers


def _backward_of(scan: str) -> Callable[..., tuple[Tensor | None, ...]]:
    """The adjoint sums forward in time: it is the same sum over reversed time, where an episode's first step
    takes the place of its last."""

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (ends,) = ctx.saved_tensors
        operation = getattr(torch.ops.covr_fast, scan)
        summed = operation(gradient.flip(0), _first_steps(ends).flip(0), *ctx.numbers)
        return summed.flip(0), None, *(None for _ in ctx.numbers)

    return backward


for _scan in ("discounted_returns", "horizon_returns"):
    torch.library.register_autograd(
        f"covr_fast::{_scan}", _backward_of(_scan), setup_context=_setup_context, lib=library
    )
