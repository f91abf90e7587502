"""How the agent teaches the VLM: EDDF selects samples, the tuner trains on them, publish hands the weights
over (Xia et al. 2026, "RL-tuned VLM")."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops
from .agents import SAC
from .buffer import FineTuneView, ReplayBuffer
from .buffer.batch import pixels
from .config import TrainConfig
from .labeller import PriorLabeller
from .logger import RunLogger
from .schedule import FineTuneSchedule
from .view import agent_view, vlm_view
from .vlm import VLMTuner


@dataclass
class _Round:
    """A round that has begun."""

    step: int
    """Environment steps at its start."""
    figures: dict[str, float]
    """What is logged of it at its end."""
    before: dict[str, Any]
    """The part of `Rounds.state_dict` that its start changes, as it was: a run that is saved before the round
    ends does it again."""


class Rounds:
    """Fine-tuning rounds of the VLM.

    When a round is due, the samples of the episodes that finished since the last one (D_f) pass the filter
    (EDDF, Eq. 5). The tuner trains on those that it keeps, weighted by their returns (RALW, Eq. 6), and
    publishes the weights to the prior. The agent gives the entropy for the filter and, with covr.bootstrap,
    the values after truncated episodes. With vlm.refresh_priors the labeller then labels transitions again.
    """

    def __init__(
        self,
        config: TrainConfig,
        agent: SAC,
        buffer: ReplayBuffer,
        tuner: VLMTuner,
        labeller: PriorLabeller | None = None,
    ) -> None:
        self._config = config
        self._agent = agent
        self._buffer = buffer
        self._tuner = tuner
        self._labeller = labeller if config.vlm.refresh_priors else None
        self._running: _Round | None = None
        self._said_waiting = False
        self.schedule = FineTuneSchedule(config.covr.psi_0, config.covr.schedule)
        self.finished = FineTuneView(
            buffer,
            gamma=config.replay.gamma,
            horizon=config.covr.horizon,
            bootstrap=self.values_after if config.covr.bootstrap else None,
        )
        """D_f."""
        self.records: list[dict[str, float]] = []
        """What summary.json says of each finished round."""

    @property
    def guiding(self) -> bool:
        """Whether the cold start is over, so that the VLM's priors guide the actor (Eq. 4)."""
        return self.schedule.rounds >= self._config.covr.cold_start

    def advance(self, step: int, log: RunLogger) -> None:
        """Begins a round that is due, and publishes one that is done. Without tuner.overlap both happen in
        one call."""
        if self._running is None and self.schedule.due(step):
            self._begin(step, log)
        if self._running is not None:
            after = self._config.covr.publish_after
            done = not self._tuner.running if after is None else step >= self._running.step + after
            if done:
                self._end(self._running, step, log)
            else:
                self._tuner.check()

    def finish(self, step: int, log: RunLogger) -> None:
        """Waits for a running round, if there is one, and publishes it."""
        if self._running is not None:
            self._end(self._running, step, log)

    def _begin(self, step: int, log: RunLogger) -> None:
        """EDDF on D_f, then fine-tuning on what it keeps. Does nothing while D_f has too few samples."""
        covr, number = self._config.covr, self.schedule.rounds + 1
        if len(self.finished) < covr.min_samples:
            if not self._said_waiting:
                log.say(
                    f"round {number} waits: D_f holds {len(self.finished)} samples of "
                    f"finished episodes, it needs covr.min_samples={covr.min_samples}"
                )
            self._said_waiting = True
            return
        self._said_waiting = False
        with log.clock("fine-tuning"):
            indices, returns = self.finished.indices, self.finished.returns
            entropy = self._policy_entropy(indices)
            kept = ops.exploration_filter(returns, entropy, threshold=covr.threshold)
            overwritten = self.finished.overwritten
            figures = {
                "round": number,
                "samples": len(returns),
                "entropy": entropy,
                "tau": kept.tau,
                "cutoff": kept.cutoff,
                "kept": len(kept.indices),
                "overwritten": overwritten,
                **self._kept_by_time(kept.indices),
            }
            if overwritten:
                log.say(
                    f"round {number}: {overwritten} steps were overwritten in the replay buffer before D_f "
                    f"was read: raise replay.capacity={self._config.replay.capacity}"
                )
            self._running = _Round(step, figures, self._resumable_state())
            self.finished.clear()
            if len(kept.indices) < 2:
                log.say(f"the filter kept {len(kept.indices)} samples: nothing to fine-tune on in this round")
                return
            ids = indices[kept.indices]
            # The images are copies: the buffer may overwrite its frames while the round runs.
            images = vlm_images(self._config, self._buffer, ids)
            self._tuner.start(images, self._buffer.actions(ids), returns[kept.indices])

    def _end(self, round: _Round, step: int, log: RunLogger) -> None:
        """Waits for the round, publishes its weights and logs it."""
        with log.clock("fine-tuning"):
            report = self._tuner.wait()
            if report:
                round.figures |= {
                    "nonzero_share": report.nonzero_share,
                    "tuning_seconds": report.seconds,
                }
                if report.held_out:
                    round.figures |= {"loss_before": report.loss_before, "loss_after": report.loss_after}
                self._tuner.publish()
                if self._labeller is not None:
                    self._labeller.refresh()
        self._running = None
        self.records.append({"step": round.step, "published": step, **round.figures})
        log.scalars(step, {f"round/{name}": value for name, value in round.figures.items()})
        log.say(_line(self.records[-1]))
        self.schedule.advance()

    def values_after(self, ids: Tensor) -> Tensor:
        """float32[n], the critic's values of the observations that followed the transitions int64[n]."""
        obs = self._buffer.get(ids, n_step=1, dtype=torch.uint8).next_obs
        return self._agent.value(agent_view(self._config, obs))

    def _policy_entropy(self, indices: Tensor) -> float:
        """e_t: minus the mean log-probability of actions on the newest samples of D_f, in nats."""
        # Ids grow with time in every environment, so the largest are the newest of all environments.
        newest = indices.topk(min(256, len(indices))).values
        return self._agent.entropy(agent_view(self._config, pixels(self._buffer.observations(newest))))

    def _kept_by_time(self, kept: Tensor) -> dict[str, float]:
        """Share of each quarter of the episodes that EDDF kept: late steps have smaller returns-to-go."""
        time = self.finished.time_in_episode
        quarter = (4 * time / (time.max() + 1)).long()
        all_, kept_ = torch.bincount(quarter, minlength=4), torch.bincount(quarter[kept], minlength=4)
        return {f"kept_share_quarter_{i + 1}": float(kept_[i] / max(int(all_[i]), 1)) for i in range(4)}

    def _resumable_state(self) -> dict[str, Any]:
        return {"tuner_rounds": self._tuner.rounds, "finished": self.finished.state_dict()}

    def state_dict(self) -> dict[str, Any]:
        """The rounds that are done. One that is running counts as not begun."""
        unfinished = self._running.before if self._running else self._resumable_state()
        return {"rounds": self.records, "rounds_done": self.schedule.rounds, **unfinished}

    def load_state_dict(self, state: dict[str, Any], *, empty_buffer: bool) -> None:
        """Goes on after the rounds of `state`; with an `empty_buffer`, which was not restored, D_f is empty
        too."""
        covr = self._config.covr
        self.records = state["rounds"]
        self.schedule = FineTuneSchedule(covr.psi_0, covr.schedule, rounds=state["rounds_done"])
        self._tuner.rounds = state["tuner_rounds"]
        if not empty_buffer:
            self.finished.load_state_dict(state["finished"])


def vlm_images(config: TrainConfig, buffer: ReplayBuffer, ids: Tensor) -> Tensor:
    """uint8[n, 3, H, W], what the VLM sees of the stored transitions int64[n]; a copy."""
    stored = buffer.observations(ids) if config.vlm.motion else buffer.frames(ids)
    return vlm_view(config, pixels(stored))


def _line(record: dict[str, float]) -> str:
    """What the console says of a finished round."""
    line = (
        f"round {record['round']:.0f} at {record['step']:.0f} steps: D_f {record['samples']:.0f}, "
        f"tau {record['tau']:.2f}, kept {record['kept']:.0f}"
    )
    if "nonzero_share" in record:
        line += f", non-zero weight {record['nonzero_share']:.0%}"
    if "loss_after" in record:
        line += f", held-out loss {record['loss_before']:.4f} -> {record['loss_after']:.4f}"
    if "tuning_seconds" in record:
        line += f", {record['tuning_seconds']:.1f} s"
    return line
