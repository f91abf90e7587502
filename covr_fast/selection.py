"""Which samples of D_f the VLM learns from: EDDF (Xia et al. 2026, Eq. 5), and what it is compared with."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import ops
from .buffer import FineTuneView
from .errors import DivergedError
from .streams import Fetch, send


class Keep(NamedTuple):
    """The rule of a selection."""

    rule: Literal["eddf", "top", "random"] = "eddf"
    """Samples above the threshold of Eq. 5; `share` of all, those with the highest scores; or as many random
    ones as are above the threshold."""
    share: float = 1.0
    z_score: bool = True
    """False: the threshold of Eq. 5 over the scores themselves. It keeps the same samples."""
    seed: int = 0
    """Of random samples."""


EDDF = Keep()


class Selection:
    """What a filter keeps of D_f as it is now.

    Returns, entropy and filter are queued where the buffer is, and so the host need not wait for the policy's
    stream: only `read` does, until the result has arrived. On a CPU all of it is done at once.

    Args:
        finished: D_f; it may be cleared afterwards.
        entropy: ids int64[n] of the newest samples -> the policy's entropy e_t on them, a scalar.
        threshold: see `ops.exploration_filter`.
        action_dim: numbers of an action, over which e_t is summed.
        reduction: what Eq. 5 takes for the entropy: e_t ("sum"), or e_t / action_dim ("mean").
        scores: float32[M] on the device of the returns, by which the samples of D_f are filtered and weighed
            instead of their returns.
        keep: the rule.
    """

    def __init__(
        self,
        finished: FineTuneView,
        entropy: Callable[[Tensor], Tensor],
        threshold: Literal["described", "equation"],
        action_dim: int,
        reduction: Literal["sum", "mean"] = "sum",
        *,
        scores: Tensor | None = None,
        keep: Keep = EDDF,
    ) -> None:
        self._keep = keep
        self._sign = 1 if threshold == "equation" else -1
        self._action_dim = action_dim
        self._divisor = action_dim if reduction == "mean" else 1
        self._ids = finished.indices
        self._episodes = finished.episodes
        self._time = finished.time_in_episode
        self._overwritten = finished.overwritten
        self._scores = scores = finished.returns if scores is None else scores
        # Ids grow with time in every environment, so the largest are the newest of all environments.
        newest = self._ids.topk(min(256, len(self._ids))).values
        # With the buffer on a CPU and the policy on a GPU, this move waits.
        nats = entropy(newest).to(scores.device)
        kept = ops.exploration_filter_padded(scores, nats / self._divisor, threshold=threshold)
        indices, tau, cutoff = kept.indices, kept.tau, kept.cutoff
        if keep.rule == "top":
            best = scores.topk(math.ceil(keep.share * len(scores)))
            indices = best.indices.sort().values
            cutoff = best.values[-1].double()
            tau = torch.where(kept.std > 0, (cutoff - kept.mean) / kept.std, 0.0)
        if not keep.z_score:
            tau = cutoff
        self._result = Fetch(indices, kept.kept, tau, cutoff, nats, scores)

    @property
    def waits(self) -> bool:
        """Whether `read` may have to wait for a device."""
        return self._result.waits

    def read(self) -> tuple[Tensor, dict[str, float]]:
        """int64[K], which samples were kept, as positions in D_f; and what is logged of D_f and the filter.

        Raises:
            DivergedError: a return, or on a GPU the entropy, is NaN or infinite.
        """
        indices, count, tau, cutoff, entropy, _ = self._result.read()
        if count < 0:
            raise DivergedError(
                "a return of D_f or the policy's entropy is NaN or infinite, so no sample can be selected"
            )
        if self._keep.rule == "top":
            kept = indices
        elif self._keep.rule == "random":
            generator = torch.Generator().manual_seed(self._keep.seed)
            kept = torch.randperm(len(self._ids), generator=generator)[: int(count)].sort().values
        else:
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

    def everything(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(ids int64[M], scores float32[M], episodes int64[M], time in the episode int32[M]) of D_f, on the
        host. Waits as `read` does."""
        return self._ids, self._result.read()[-1], self._episodes, self._time

    def samples(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(ids int64[K], scores float32[K], episodes int64[K]) of these positions int64[K]. All are on the
        host but the scores, which are where the buffer is. Never waits."""
        return self._ids[kept], self._scores[send(kept, self._scores.device)], self._episodes[kept]

    def _kept_by_time(self, kept: Tensor) -> dict[str, float]:
        """Share of each quarter of the episodes that was kept: late steps have smaller returns-to-go."""
        quarter = (4 * self._time / (self._time.max() + 1)).long()
        all_, kept_ = torch.bincount(quarter, minlength=4), torch.bincount(quarter[kept], minlength=4)
        return {f"kept_share_quarter_{i + 1}": float(kept_[i] / max(int(all_[i]), 1)) for i in range(4)}
