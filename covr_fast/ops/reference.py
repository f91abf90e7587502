"""The plain-torch truth of every operation: what the tests and benchmarks compare the kernels with.

These functions run on any device and are written to be read, not to be fast. Arguments are checked by the
public functions of `covr_fast.ops`, which these are `backend="reference"` of.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def discounted_returns(
    rewards: Tensor, ends: Tensor, gamma: float, horizon: int | None = None, bootstrap: Tensor | None = None
) -> Tensor:
    """`g[t] = r[t] + gamma * (bootstrap[t] if last[t] else g[t + 1])`, everything [T, N]; the last steps are
    the ends and T - 1. With a `horizon`, the sum of at most so many steps."""
    after = torch.zeros_like(rewards) if bootstrap is None else bootstrap
    last = ends.clone()
    last[-1:] = True
    if horizon is not None:
        return _horizon_returns(torch.where(last, rewards + gamma * after, rewards), last, gamma, horizon)
    result = torch.empty_like(rewards)
    following = rewards.new_zeros(rewards.shape[1])
    for t in reversed(range(rewards.shape[0])):
        following = rewards[t] + gamma * torch.where(last[t], after[t], following)
        result[t] = following
    return result


def _horizon_returns(rewards: Tensor, last: Tensor, gamma: float, horizon: int) -> Tensor:
    """`g[t] = sum over k < horizon of gamma^k * r[t + k]`, up to the last step of the episode. The sum is of
    doubles, its products are of the rewards' dtype."""
    total = torch.zeros_like(rewards, dtype=torch.float64)
    alive = torch.ones_like(last)
    power = 1.0
    for k in range(min(horizon, rewards.shape[0])):
        steps = rewards.shape[0] - k
        total[:steps] += torch.where(alive, power * rewards[k:], 0.0)
        alive = (alive & ~last[k:])[:-1]
        power *= gamma
    return total.to(rewards.dtype)


def exploration_filter(returns: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """Indices kept, and float64 [tau, cutoff, mean, std]; `scale` is the sigmoid of Eq. 5.

    z-scores are never formed: `z > tau` is `returns > mean + std * tau`, and since quantiles commute with
    the z-score that cutoff is `median + scale * IQR` of the returns themselves, whatever mean and std are.
    """
    ordered = returns.double().sort().values
    lower, median, upper = (_quantile(ordered, q) for q in (0.25, 0.5, 0.75))
    centred = returns.double() - ordered[0]  # exact for equal returns, and safe for huge offsets
    mean = ordered[0] + centred.mean()
    std = centred.std(correction=0)
    cutoff = median + scale * (upper - lower)
    tau = torch.where(std > 0, (cutoff - mean) / std, 0.0)
    kept = (returns.double() > cutoff) & (std > 0)
    return kept.nonzero().squeeze(1), torch.stack([tau, cutoff, mean, std])


def _quantile(ordered: Tensor, q: float) -> Tensor:
    """numpy's method "linear" on sorted values (torch.quantile refuses more than 2**24 of them)."""
    position = (ordered.numel() - 1) * q
    below = int(position)
    above = min(below + 1, ordered.numel() - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def return_weights(returns: Tensor) -> Tensor:
    """`max(minmax(returns) to [-1, 1], 0)`; ones where all returns are equal."""
    if returns.numel() == 0:
        return torch.empty_like(returns)
    wide = returns.double()
    low, high = wide.aminmax()
    weights = (2 * (wide - low) / (high - low) - 1).clamp_min(0)
    return torch.where(high > low, weights, 1.0).to(returns.dtype)


def return_weighted_cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor, label_smoothing: float, ignore_index: int
) -> Tensor:
    """`sum(w[b, t] * nll[b, t]) / N_v` over the labels that are not ignored; weights [B] hold for all t."""
    valid = labels != ignore_index
    weights = per_label(weights).expand_as(labels)
    matters = valid & (weights > 0)
    nll = F.cross_entropy(
        logits[matters].to(_accumulator(logits)),
        labels[matters],
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return (weights[matters].to(nll.dtype) * nll).sum() / valid.sum().clamp_min(1)


def per_label(weights: Tensor) -> Tensor:
    """[B, 1] of weights [B], and [B, T] as it is: what spreads over labels [B, T]."""
    return weights if weights.ndim == 2 else weights[:, None]


def return_weighted_linear_cross_entropy(
    hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, label_smoothing: float, ignore_index: int
) -> Tensor:
    """`return_weighted_cross_entropy(hidden @ head.T, ...)`, all logits at once."""
    logits = F.linear(hidden, head)
    return return_weighted_cross_entropy(logits, labels, weights, label_smoothing, ignore_index)


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def window(frames: Tensor, offsets: Tensor, pad: int, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """`out[b, c, y, x] = frames[b, c, y + dy - pad, x + dx - pad]`, clamped to the image, over 255."""
    height, width = frames.shape[-2:]
    rows = torch.arange(size[0], device=frames.device) + offsets[:, :1] - pad
    columns = torch.arange(size[1], device=frames.device) + offsets[:, 1:] - pad
    batch = torch.arange(frames.shape[0], device=frames.device)[:, None, None]
    picked = frames.movedim(1, -1)[
        batch, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]
    ]
    picked = picked.movedim(-1, 1).contiguous()
    return picked if dtype == torch.uint8 else (picked.float() / 255).to(dtype)


class SumTree:
    """Leaves and a cumulative sum: O(capacity) per draw, and nothing to get wrong."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.leaves = torch.zeros(capacity, dtype=torch.float32, device=device)

    def update(self, indices: Tensor, priorities: Tensor) -> None:
        for index, priority in zip(indices.tolist(), priorities.tolist(), strict=True):
            if not 0 <= index < self.leaves.numel():
                raise ValueError(f"SumTree: index {index} is not in [0, {self.leaves.numel()})")
            if not 0 <= priority < math.inf:
                raise ValueError(f"SumTree: priorities must be finite and not negative, found {priority}")
        # Indexed assignment leaves the winner among duplicates open; the last one is meant.
        last = dict(zip(indices.tolist(), priorities.tolist(), strict=True))
        where = torch.tensor(list(last), dtype=torch.int64, device=self.leaves.device)
        self.leaves[where] = torch.tensor(list(last.values()), dtype=torch.float32, device=self.leaves.device)

    def total(self) -> Tensor:
        return self.leaves.double().sum()

    def descend(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """The leaf that each `u * total` falls into, for u in [0, 1), and its probability."""
        cumulative = self.leaves.double().cumsum(0)
        drawn = torch.searchsorted(cumulative, uniforms * cumulative[-1], right=True)
        drawn = drawn.clamp_max(int(self.leaves.nonzero()[-1]))  # u * total may round up to the total
        return drawn, self.leaves[drawn].double() / cumulative[-1]
