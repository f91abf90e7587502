"""Replay that prefers what returned most: half of each batch from the best transitions, half from all (Xia et
al. 2026, the ablations without a VLM)."""

import torch
from torch import Tensor

from .buffer import FineTuneView, Prioritized, ReplayBuffer
from .config import TrainConfig
from .schedule import is_due

SAMPLER = Prioritized(alpha=1.0, beta=0.0)
"""Of the buffer: what is drawn twice as often counts twice, as in training on the best samples."""
_EVERY = 1000
"""Decisions between two choices of the best: each looks at everything stored."""


class BestReturns:
    """Sets the priorities of a buffer whose sampler is `SAMPLER`.

    The best are the share `replay.best_share` of the stored transitions of finished episodes with the highest
    returns. Of N transitions, K of them best, each is drawn with probability 1 / 2N, and a best one with
    1 / 2K more.
    """

    def __init__(self, config: TrainConfig, buffer: ReplayBuffer) -> None:
        self._buffer = buffer
        self._share = config.replay.best_share
        # Never cleared, so it holds whatever is finished and stored.
        self._finished = FineTuneView(buffer, config.replay.gamma, config.covr.horizon)

    def added(self, stored: Tensor, before: int, decisions: int) -> None:
        """The transitions int64[n] were stored, and the decisions so far went from `before` to `decisions`.
        New ones are not yet among the best."""
        self._buffer.update_priorities(stored, torch.ones(len(stored), dtype=torch.float32, device="cpu"))
        if is_due(_EVERY, before, decisions):
            self.choose()

    def choose(self) -> None:
        """Chooses the best anew."""
        ids, returns = self._finished.indices, self._finished.returns.cpu()
        if not len(ids):
            return
        count = max(1, round(self._share * len(ids)))
        priority = torch.ones(len(ids), dtype=torch.float32, device="cpu")
        priority[returns.topk(count).indices] += len(self._buffer) / count
        self._buffer.update_priorities(ids, priority)
