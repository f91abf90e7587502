"""How the agent teaches the VLM: EDDF selects samples, the tuner trains on them, publish hands the weights
over (Xia et al. 2026, "RL-tuned VLM")."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .buffer import FineTuneView, ReplayBuffer
from .buffer.batch import pixels
from .config import TrainConfig
from .errors import os_error_text
from .judge import Judge
from .labeller import PriorLabeller
from .logger import RunLogger
from .round_record import RoundRecord, choose_shown, weights_of
from .schedule import FineTuneSchedule
from .selection import Keep, Selection
from .streams import Fetch, send
from .view import vlm_view
from .vlm import VLMTuner

BEST = 64
"""Samples of a round, those with the highest returns, whose likelihood is logged before and after it."""


@dataclass
class _Round:
    """A round that has begun."""

    step: int
    """Environment steps at its start."""
    before: dict[str, Any]
    """The part of `Rounds.state_dict` that its start changes, as it was: a run that is saved before the round
    ends does it again."""
    selection: Selection | None
    """Its samples, until the tuner has them."""
    figures: dict[str, float] = field(default_factory=dict)
    """What is logged of it at its end."""
    best: tuple[Tensor, Tensor] | None = None
    """Images and actions of its samples with the highest returns, if it has any."""
    record: RoundRecord | None = None
    """What it selected, if it kept anything to learn from."""

    @property
    def waits(self) -> bool:
        """Whether its samples may still have to be waited for."""
        return self.selection is not None and self.selection.waits


class Rounds:
    """Fine-tuning rounds of the VLM.

    When a round is due, the samples of the episodes that finished since the last one (D_f) pass the filter
    (EDDF, Eq. 5). The tuner trains on those that it keeps, weighted by their returns (RALW, Eq. 6), and
    publishes the weights to the prior. covr.filter, covr.score and covr.weights take other samples, numbers
    and weights. The judge gives the entropy for the filter and, with covr.bootstrap, the values after
    truncated episodes. With vlm.refresh_priors the labeller then labels transitions again.

    On a GPU the filter's work is queued when the round is due, and the tuner begins in the next call: the
    host waits for no work that was queued in between. Samples that the ring overwrote in between are left
    out.

    Args:
        before_publish: called just before the weights of a round replace those that the prior has.
    """

    def __init__(
        self,
        config: TrainConfig,
        judge: Judge,
        buffer: ReplayBuffer,
        tuner: VLMTuner,
        labeller: PriorLabeller | None = None,
        before_publish: Callable[[], object] = lambda: None,
    ) -> None:
        self._config = config
        self._judge = judge
        self._buffer = buffer
        self._tuner = tuner
        self._labeller = labeller if config.vlm.refresh_priors else None
        self._before_publish = before_publish
        self._running: _Round | None = None
        self._said_waiting = False
        self.schedule = FineTuneSchedule(config.covr.psi_0, config.covr.schedule)
        self.finished = FineTuneView(
            buffer,
            gamma=config.replay.gamma,
            horizon=config.covr.horizon,
            bootstrap=judge.values_after if config.covr.bootstrap else None,
        )
        """D_f."""
        self.records: list[dict[str, float]] = []
        """What summary.json says of each finished round."""

    @property
    def guiding(self) -> bool:
        """Whether the cold start is over, so that the VLM's priors guide the actor (Eq. 4)."""
        return self.tuned >= self._config.covr.cold_start

    @property
    def tuned(self) -> int:
        """Rounds that tuned the VLM: each made a version of its weights. A round that kept nothing to learn
        from is done, but made none."""
        return self._tuner.prior.version

    def advance(self, step: int, log: RunLogger) -> bool:
        """Begins a round that is due, and publishes one that is done. Without tuner.overlap both happen in
        one call, and on a GPU in the next one. Returns whether one ended: it is the last of `records`."""
        if self._running is None and self.schedule.due(step):
            self._running = self._begin(step, log)
            if self._running is not None and self._running.waits:
                return False
        if self._running is not None:
            self._tune(self._running, log)
            after = self._config.covr.publish_after
            done = not self._tuner.running if after is None else step >= self._running.step + after
            if done:
                self._end(self._running, step, log)
                return True
            self._tuner.check()
        return False

    def finish(self, step: int, log: RunLogger) -> bool:
        """Waits for a running round, if there is one, and publishes it. Returns whether there was one."""
        if self._running is None:
            return False
        self._tune(self._running, log)
        self._end(self._running, step, log)
        return True

    def _begin(self, step: int, log: RunLogger) -> _Round | None:
        """EDDF on D_f. Does nothing while D_f has too few samples."""
        covr = self._config.covr
        if len(self.finished) < covr.min_samples:
            if not self._said_waiting:
                log.say(
                    f"round {self.schedule.rounds + 1} waits: D_f holds {len(self.finished)} samples of "
                    f"finished episodes, it needs covr.min_samples={covr.min_samples}"
                )
            self._said_waiting = True
            return None
        self._said_waiting = False
        with log.clock("fine-tuning"):
            number = self.schedule.rounds + 1
            selection = Selection(
                self.finished,
                self._judge.entropy,
                covr.threshold,
                self._judge.action_dim,
                covr.entropy,
                scores=self._scores(),
                keep=Keep(covr.filter, covr.top_share, covr.z_score, self._seed(number)),
            )
            before = self._resumable_state()
            self.finished.clear()
            return _Round(step, before, selection)

    def _tune(self, round: _Round, log: RunLogger) -> None:
        """Begins the fine-tuning on what EDDF has kept, unless it has begun."""
        if round.selection is None:
            return
        number = self.schedule.rounds + 1
        with log.clock("fine-tuning"):
            selection, round.selection = round.selection, None
            kept, figures = selection.read()
            stored = self._buffer.contains(selection.samples(kept)[0])
            round.figures = {"round": number, **figures}
            round.figures["overwritten"] += len(kept) - int(stored.sum())
            if lost := round.figures["overwritten"]:
                log.say(
                    f"round {number}: {lost} steps were overwritten in the replay buffer before D_f "
                    f"was read: raise replay.capacity={self._config.replay.capacity}"
                )
            ids, returns, episodes = selection.samples(kept[stored])
            if len(ids) < 2:
                log.say(f"the filter kept {len(ids)} samples: nothing to fine-tune on in this round")
                return
            # The images are copies: the buffer may overwrite its frames while the round runs.
            images, actions = vlm_images(self._config, self._buffer, ids), self._buffer.actions(ids)
            best = returns.topk(min(BEST, len(returns))).indices
            round.best = images[best], send(actions, best.device)[best]
            weights = self._weights(number, len(ids))
            round.record = self._recorded(round, selection, kept[stored], weights_of(returns, weights))
            self._tuner.start(images, actions, returns, episodes, weights=weights)

    def _seed(self, number: int) -> int:
        """Of what is random in a round."""
        return 1_000_003 * self._config.seed + number

    def _scores(self) -> Tensor | None:
        """float32[M], by what the samples of D_f are filtered and weighed. None: by their returns."""
        if self._config.covr.score == "reward":
            return self.finished.rewards
        if self._config.covr.score == "q":
            return self._judge.q(self.finished.indices).to(self._buffer.device)
        return None

    def _weights(self, number: int, count: int) -> Tensor | None:
        """float32[count], the weights of a round's samples in its loss. None: those of their returns."""
        kind = self._config.covr.weights
        if kind == "equal":
            return torch.ones(count, dtype=torch.float32, device="cpu")
        if kind == "random":
            generator = torch.Generator().manual_seed(self._seed(number))
            return torch.rand(count, generator=generator, dtype=torch.float32, device="cpu")
        return None

    def _recorded(self, round: _Round, selection: Selection, kept: Tensor, weights: Fetch) -> RoundRecord:
        ids, scores, episodes, time = selection.everything()
        shown = choose_shown(scores, kept, self._buffer.contains(ids))
        frames = vlm_images(self._config, self._buffer, ids[shown])
        number, cutoff = int(round.figures["round"]), round.figures["cutoff"]
        return RoundRecord(number, round.step, cutoff, scores, weights, kept, episodes, time, shown, frames)

    def _end(self, round: _Round, step: int, log: RunLogger) -> None:
        """Waits for the round, publishes its weights and logs it."""
        with log.clock("fine-tuning"):
            report = self._tuner.wait()
            if report:
                round.figures |= {
                    "nonzero_share": report.nonzero_share,
                    "episodes": report.episodes,
                    "held_out": report.held_out,
                    "tuning_seconds": report.seconds,
                }
                if report.held_out:
                    round.figures |= {"loss_before": report.loss_before, "loss_after": report.loss_after}
                lost = report.lora_lost
                if lost is not None and not math.isnan(lost):  # NaN if LoRA changes nothing
                    round.figures["lora_lost"] = lost
                if "lora_lost" in round.figures and report.lora_beside:
                    log.say(
                        "LoRA is served beside the base: merged into its half precision it would lose "
                        f"{lost:.0%} of its change"
                    )
                round.figures |= self._best_log_prob(round, "before", log)
                self._before_publish()
                round.figures["version"] = self._tuner.publish()
                if self._labeller is not None:
                    self._labeller.refresh()
                self._write(round, log)
        # Before anything else is computed: if that fails, the run is saved, and its records must say of which
        # round the weights are.
        record: dict[str, float] = {
            "step": round.step, "published": step, "tuned_rounds": self.tuned, **round.figures,
        }  # fmt: skip
        self._running = None
        self.records.append(record)
        self.schedule.advance()
        if report:
            with log.clock("fine-tuning"):
                record |= self._best_log_prob(round, "after", log)
        figures = {name: value for name, value in record.items() if name not in ("step", "published")}
        log.scalars(step, {f"round/{name}": value for name, value in figures.items()})
        log.say(_line(record))

    def _write(self, round: _Round, log: RunLogger) -> None:
        """Writes what the round selected. A run whose disk is full says so and goes on."""
        assert round.record is not None
        try:
            round.record.write(log.folder)
        except OSError as error:
            log.say(f"what round {round.record.number} selected is not on disk: {os_error_text(error)}")

    def _best_log_prob(self, round: _Round, when: str, log: RunLogger) -> dict[str, float]:
        """How likely the VLM is, with the weights that it serves now, to answer as the agent acted in the
        round's best samples: the mean log-probability of these answers, in nats. A run does without this
        figure if there is no memory for it."""
        assert round.best is not None
        try:
            return {f"best_log_prob_{when}": float(self._tuner.prior.log_prob(*round.best).mean())}
        except MemoryError as error:
            log.say(f"the likelihood of the best actions {when} the round is not known: {error}")
            return {}

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
        line += f" ({record['nonzero_share']:.0%} with weight)"
    if "loss_after" in record:
        line += f", held-out loss {record['loss_before']:.3f} -> {record['loss_after']:.3f}"
    elif record.get("episodes") == 1:
        line += ", no held-out loss: all samples are of one episode"
    if {"best_log_prob_before", "best_log_prob_after"} <= record.keys():
        line += (
            f", log p of best actions {record['best_log_prob_before']:.2f} -> "
            f"{record['best_log_prob_after']:.2f}"
        )
    if "version" not in record:
        return f"{line}: nothing was tuned, so it does not count towards covr.cold_start"
    return f"{line}, {record['tuning_seconds']:.1f} s"
