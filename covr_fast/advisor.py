"""The VLM in a run's loop: it gives priors, is tuned in rounds, and its answers are written down."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .agents import Agent
from .buffer import ReplayBuffer
from .checkpoint import Checkpoint
from .collect import Collector
from .config import TrainConfig
from .judge import AgentJudge, VLMJudge
from .labeller import PriorLabeller
from .load_vlm import load_prior
from .logger import Clock, MeanMetrics, RunLogger
from .round_record import drop_records
from .rounds import Rounds, vlm_images
from .schedule import is_due
from .staleness import Trust, age_figures, mask_older
from .transcript import Transcript, write_prompt
from .view import vlm_view
from .vlm import PriorBatch, VLMTuner


class Advisor:
    """What a run does with its VLM. Runs without one have no advisor.

    Args:
        folder: the run's.
        agent: None if the VLM decides itself (covr.decides="vlm").
        saved: the checkpoint from which the run goes on.
        keep_weights: is called before a round's weights replace those of the round before.

    Raises:
        UserError: as for `load_prior`.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        collector: Collector,
        buffer: ReplayBuffer,
        agent: Agent | None,
        device: torch.device,
        *,
        action_dim: int,
        saved: Checkpoint | None,
        keep_weights: Callable[[], object],
    ) -> None:
        self._config = config
        self._folder = folder
        self._collector = collector
        self._buffer = buffer
        tuned = saved if config.has_rounds else None  # a frozen one is not saved
        with tuned.opening(tuned.vlm) if tuned else nullcontext():
            model = tuned.vlm if tuned else config.vlm.model
            self.prior = load_prior(config, action_dim, device, model)
        self._noise = torch.Generator().manual_seed(config.seed)
        self._metrics = MeanMetrics()
        self.tuner: VLMTuner | None = None
        self.labeller: PriorLabeller | None = None
        self.rounds: Rounds | None = None
        if config.has_rounds:
            self.tuner = VLMTuner(self.prior, config.tuner, seed=config.seed)
        if config.vlm.background:
            self.labeller = PriorLabeller(
                self.prior,
                buffer,
                lambda ids: vlm_images(config, buffer, ids),
                temperature=config.vlm.temperature,
                generator=self._noise,
                trust=Trust.of(config),
                confidence=config.covr.confidence,
            )
        if self.tuner is not None:
            judge = AgentJudge(config, agent, buffer) if agent else VLMJudge(config, self.prior, buffer)
            self.rounds = Rounds(config, judge, buffer, self.tuner, self.labeller, keep_weights)
        self.transcript = Transcript(folder, config, self.prior, buffer)

    @property
    def guiding(self) -> bool:
        """Whether the VLM's priors guide the agent (Eq. 4): a frozen one from the start, else once the cold
        start is over."""
        return self._config.has_agent and (self.rounds is None or self.rounds.guiding)

    def begin(self, step: int) -> None:
        """Writes the prompt. The transcript goes on after `step`, and what later rounds selected is
        removed."""
        write_prompt(self._folder, self.prior, (self._config.env.height, self._config.env.width))
        self.transcript.resume(step)
        if self.rounds is not None:
            drop_records(self._folder, self.rounds.schedule.rounds)

    # ---- priors ------------------------------------------------------------------------------------

    def answer(self, obs: np.ndarray) -> PriorBatch:
        """The VLM's answers for uint8[n, C, H, W], with the run's randomness."""
        return self.prior(
            vlm_view(self._config, torch.from_numpy(obs)),
            temperature=self._config.vlm.temperature,
            generator=self._noise,
            confidence=self._config.covr.confidence,
        )

    def advise(self, obs: np.ndarray, env_ids: np.ndarray, clock: Clock) -> None:
        """While the latest decisions of these environments are simulated, the VLM gives its prior for the
        same frames, where it is due and not asked in the background."""
        due = self._due(env_ids) & (self.labeller is None)
        asked = env_ids[due]
        if len(asked):
            with clock("prior"):
                answer = self.answer(obs[due])
            weight: np.ndarray | float = 1.0
            if answer.confidence is not None:
                self._metrics.add({"prior_confidence": answer.confidence})
                weight = answer.confidence.cpu().numpy()
            prior = answer.action.cpu().numpy()
            self._collector.set_prior(prior, answer.version, asked, weight)
            distance = np.square(prior - self._collector.latest_action(asked)).sum(-1)
            self._metrics.add({"prior_to_action": torch.from_numpy(distance)})
        if self._config.vlm.between == "mask":
            self._collector.mask_prior(env_ids[~due])

    def _due(self, env_ids: np.ndarray) -> np.ndarray:
        """bool[n], whether the VLM is asked about the latest decision of each of these environments."""
        repeat, every = self._config.env.action_repeat, self._config.vlm.every
        numbers = self._collector.latest(env_ids)
        return np.array([k == 0 or is_due(every, (k - 1) * repeat, k * repeat) for k in numbers], bool)

    def label(self, stored: Tensor, env_ids: np.ndarray, clock: Clock) -> None:
        """In the background, the VLM is asked about the new transitions int64[n] of these environments that
        are due."""
        if self.labeller is not None:
            with clock("prior"):
                self.labeller.due(stored[torch.from_numpy(self._due(env_ids))].tolist())
                self.labeller.step()

    def write_answers(self, step: int, stored: Tensor, clock: Clock) -> None:
        """Writes some answers of weights that are new: about the transitions int64[n]."""
        with clock("prior"):
            if self.labeller is None:
                self.transcript.update(step, stored)
            elif self.labeller.latest is not None:
                self.transcript.note(step, *self.labeller.latest)

    # ---- rounds ------------------------------------------------------------------------------------

    def advance(self, step: int, log: RunLogger) -> bool:
        """Begins a round that is due, and ends one that is done; returns whether one ended."""
        return self._advanced(lambda rounds: rounds.advance(step, log))

    def finish(self, step: int, log: RunLogger) -> bool:
        """Waits for a round that is running; returns whether one was."""
        return self._advanced(lambda rounds: rounds.finish(step, log))

    def _advanced(self, turn: Callable[[Rounds], bool]) -> bool:
        version = self.prior.version
        ended = self.rounds is not None and turn(self.rounds)
        if self.prior.version > version:
            self.mask_old_priors()
        return ended

    @property
    def _oldest_guiding(self) -> int:
        return Trust.of(self._config).oldest(self.prior.version)

    def mask_old_priors(self) -> None:
        """Masks the priors that are trusted no more: see staleness.Trust."""
        mask_older(self._buffer, self._oldest_guiding)
        self._collector.mask_older(self._oldest_guiding)

    def stop(self) -> None:
        """Drops a round that is running, and ends the threads."""
        if self.tuner is not None:
            self.tuner.stop()
        if self.labeller is not None:
            self.labeller.close()

    # ---- figures and state -------------------------------------------------------------------------

    def figures(self) -> dict[str, float]:
        """What is logged of the priors since the last call."""
        figures = self._metrics.read()
        if self.labeller is not None:
            figures |= self.labeller.metrics.read()
        ages = age_figures(self._buffer, self.prior.version, self._oldest_guiding)
        return figures | {"guided": float(self.guiding)} | ages

    def state_dict(self) -> dict[str, Any]:
        """The part of counters.pt that is the VLM's."""
        return {
            **(self.rounds.state_dict() if self.rounds is not None else {}),
            "prior_noise": self._noise.get_state(),
            "prior_version": self.prior.version,
            "labeller": self.labeller.state_dict() if self.labeller else None,
        }

    def load_state_dict(self, state: dict[str, Any], *, empty_buffer: bool) -> None:
        """The inverse; with an `empty_buffer`, which was not restored, D_f is empty too."""
        if self.rounds is not None:
            self.rounds.load_state_dict(state, empty_buffer=empty_buffer)
        self._noise.set_state(state["prior_noise"])
        self.prior.version = state["prior_version"]
        if self.labeller and state["labeller"]:
            self.labeller.load_state_dict(state["labeller"])
