"""EDDF: which samples of D_f the VLM learns from (Xia et al. 2026, Eq. 5)."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from . import ops
from .buffer import FineTuneView
from .errors import DivergedError
from .streams import Fetch, send


class Selection:
    """What the exploration filter keeps of D_f as it is now.

    Returns, entropy and filter are queued where the buffer is, and so the host need not wait for the policy's
    stream: only `read` does, until the result has arrived. On a CPU all of it is done at once.

    Args:
        finished: D_f; it may be cleared afterwards.
        entropy: ids int64[n] of the newest samples -> the policy's entropy e_t on them, a scalar.
        threshold: see `ops.exploration_filter`.
        action_dim: numbers of an action, over which e_t is summed.
        reduction: what Eq. 5 takes for the entropy: e_t ("sum"), or e_t / action_dim ("mean").
    """

    def __init__(
        self,
        finished: FineTuneView,
        entropy: Callable[[Tensor], Tensor],
        threshold: Literal["described", "equation"],
        action_dim: int,
        reduction: Literal["sum", "mean"] = "sum",
    ) -> None:
        self._sign = 1 if threshold == "equation" else -1
        self._action_dim = action_dim
        self._divisor = action_dim if reduction == "mean" else 1
        self._ids = finished.indices
        self._episodes = finished.episodes
        self._time = finished.time_in_episode
        self._overwritten = finished.overwritten
        self._returns = returns = finished.returns
        # Ids grow with time in every environment, so the largest are the newest of all environments.
        newest = self._ids.topk(min(256, len(self._ids))).values
        # With the buffer on a CPU and the policy on a GPU, this move waits.
        nats = entropy(newest).to(returns.device)
        kept = ops.exploration_filter_padded(returns, nats / self._divisor, threshold=threshold)
        self._result = Fetch(kept.indices, kept.kept, kept.tau, kept.cutoff, nats)

    @property
    def waits(self) -> bool:
        """Whether `read` may have to wait for a device."""
        return self._result.waits

    def read(self) -> tuple[Tensor, dict[str, float]]:
        """int64[K], which samples were kept, as positions in D_f; and what is logged of D_f and the filter.

        Raises:
            DivergedError: a return, or on a GPU the entropy, is NaN or infinite.
        """
        indices, count, tau, cutoff, entropy = self._result.read()
        if count < 0:
            raise DivergedError(
                "a return of D_f or the policy's entropy is NaN or infinite, so no sample can be selected"
            )
        kept = indices[: int(count)]
        return kept, {
            "samples": len(self._ids),
            "entropy": entropy.item(),
            "entropy_per_number": entropy.item() / self._action_dim,
            "iqr_coefficient": torch.sigmoid(self._sign * entropy.double() / self._divisor).item(),
            "tau": tau.item(),
            "cutoff": cutoff.item(),
            "kept": len(kept),
            "overwritten": self._overwritten,
            **self._kept_by_time(kept),
        }

    def samples(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(ids int64[K], returns float32[K], episodes int64[K]) of these positions int64[K]. All are on the
        host but the returns, which are where the buffer is. Never waits."""
        return self._ids[kept], self._returns[send(kept, self._returns.device)], self._episodes[kept]

    def _kept_by_time(self, kept: Tensor) -> dict[str, float]:
        """Share of each quarter of the episodes that was kept: late steps have smaller returns-to-go."""
        quarter = (4 * self._time / (self._time.max() + 1)).long()
        all_, kept_ = torch.bincount(quarter, minlength=4), torch.bincount(quarter[kept], minlength=4)
        return {f"kept_share_quarter_{i + 1}": float(kept_[i] / max(int(all_[i]), 1)) for i in range(4)}
