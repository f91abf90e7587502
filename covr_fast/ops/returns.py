"""Discounted return-to-go within episodes."""

import math
from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import reference
from ._backend import Backend, check_floating, check_same_device, fake, launch, library, operator, select
from ._memory import empty

_DTYPES = (torch.float32, torch.float64)


def discounted_returns(rewards: Tensor, ends: Tensor, gamma: float, *, backend: Backend = "auto") -> Tensor:
    """`for t in reversed(range(T)): g[t] = r[t] + torch.where(ends[t], 0, gamma * g[t + 1])`, `g[T] = 0`.

    The return of COVR's filter, `g_t = sum_k gamma^(k-t) r_k` up to the end of the trajectory (Xia et al.
    2026, sec. EDDF). The tail after a column's last end is treated as ending at T - 1.

    Args:
        rewards: [T, N] of a floating dtype; N independent columns (environments) of T steps.
        ends: bool [T, N]; true at the last step of an episode.
        gamma: discount per step, in [0, 1].
        backend: "auto", "reference", "cpp" or "cuda". Half-precision rewards are summed in float32.

    Returns:
        [T, N] of the rewards' dtype; differentiable in `rewards`. The result does not depend on the number
        of threads.
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
    check_same_device(name, rewards=rewards, ends=ends)
    wide = rewards if rewards.dtype in _DTYPES else rewards.float()
    if select(name, backend, wide, ("cpp", "cuda"), _DTYPES) == "reference":
        result = reference.discounted_returns(wide, ends, gamma)
    else:
        result = torch.ops.covr_fast.discounted_returns(wide, ends, gamma)
    return result.to(rewards.dtype)


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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, ends, gamma = inputs
    ctx.save_for_backward(ends)
    ctx.gamma = gamma


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    # The adjoint sums forward in time: it is the same scan over reversed time, where an episode's first
    # step, the one after an end, takes the place of its last.
    (ends,) = ctx.saved_tensors
    starts = torch.ones_like(ends)
    starts[1:] = ends[:-1]
    scanned = torch.ops.covr_fast.discounted_returns(gradient.flip(0), starts.flip(0), ctx.gamma)
    return scanned.flip(0), None, None


torch.library.register_autograd(
    "covr_fast::discounted_returns", _backward, setup_context=_setup_context, lib=library
)
