"""The COVR loop (Xia et al. 2026, Alg. 1)."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .agents import Guidance, make_agent
from .buffer import Batch
from .checkpoint import Checkpoint, reserved_room, restore_agent
from .collect import Collector
from .config import TrainConfig
from .envs import Rows, make_env
from .errors import DivergedError, UserError, as_user_error, os_error_as_user_error
from .evaluate import Evaluation, Evaluations
from .files import write_whole
from .host_memory import keep_freed_memory
from .labeller import PriorLabeller
from .logger import Clock, MeanMetrics, RunLogger
from .model_card import write_run_card
from .parts import (
    compute_device,
    load_prior,
    loop_threads,
    new_batches,
    new_buffer,
    replay_device,
    use_tensor_cores,
)
from .report import plot_curves
from .resume import open_resumed
from .rounds import Rounds, vlm_images
from .run_folder import RunFolder
from .saving import Counters, RunSaver, deferred_interrupts
from .schedule import is_due
from .seeds import training_seed
from .staleness import Trust, age_figures, mask_older
from .streams import Lane
from .transcript import Transcript, write_prompt
from .versions import drop_staged
from .view import agent_obs_shape, agent_view, vlm_view
from .vlm import VLMTuner


class Trainer:
    """Trains an agent and a VLM that teach each other, and writes a run folder.

    Per decision of a batch of environments: the actor acts. While its action is simulated, the VLM gives a
    prior for the same frames if it is due, and the agent updates from the replay buffer. When a round is due,
    the episodes that finished since the last one pass the filter (EDDF) and fine-tune the VLM, weighted by
    their returns (RALW). After the cold start the VLM's priors guide the actor (Eq. 4).
    """

    def __init__(self, config: TrainConfig, out: Path | str | RunFolder, *, resume: bool = False):
        """Builds everything, and writes nothing yet.

        Args:
            config: the settings; see TrainConfig.preset.
            out: the run folder.
            resume: continue the run in `out` from its checkpoint. Its unfinished episodes end where they were
                interrupted, and new ones start; everything else goes on as before. Settings of `config` that
                differ from those of the run take effect, or are refused (see `resume.MAY_CHANGE`).

        Raises:
            UserError: settings that do not fit together or may not change, nothing to resume from, or another
                process is writing the run.
        """
        config.check()
        self.config = config = TrainConfig.from_dict(config.to_dict())  # the caller may change theirs
        if config.vlm.model != "nano" and Path(config.vlm.model).is_dir():
            config.vlm.model = str(Path(config.vlm.model).resolve())  # a run may be resumed from anywhere
        self.folder = out if isinstance(out, RunFolder) else RunFolder(out)
        self.out = self.folder.path
        if resume:
            with self.folder.claimed(resume=True):
                self._build(open_resumed(self.out, config))
        else:
            self._build(None)

    def _build(self, saved: Checkpoint | None) -> None:
        config = self.config
        self.device = compute_device(config.device)
        use_tensor_cores(self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.threads = loop_threads(config)
        # Before anything is computed: the order of sums, and so even the initial weights, depends on it.
        torch.set_num_threads(self.threads)
        self._continues = saved.written if saved else None  # the time of the checkpoint
        begin = saved.counters["step"] if saved else 0
        env_seed = training_seed(config.env.seed, config.seed, begin, config.env.num_envs)
        self.envs = make_env(replace(config.env, seed=env_seed))
        try:
            self._build_learners(saved)
        except BaseException:  # nobody else will close what simulators hold
            self.envs.close()
            raise

    def _build_learners(self, saved: Checkpoint | None) -> None:
        config = self.config
        (action_dim,) = self.envs.action_shape
        with as_user_error():
            self.agent = make_agent(
                agent_obs_shape(config),
                (action_dim,),
                config.agent,
                device=self.device,
                seed=config.seed,
                guidance=Guidance(config.covr.normalise, config.covr.distance),
            )
            frames_on = replay_device(config.replay.device, self.device)
            if saved and saved.has_replay():
                self.buffer = saved.buffer(frames_on)
            else:  # a run whose steps are done is resumed without one
                self.buffer = new_buffer(config, self.envs, frames_on)
            self._batches = new_batches(config, self.buffer)
            model = saved.vlm if saved else config.vlm.model
            with saved.opening(saved.vlm) if saved else nullcontext():
                self.prior = load_prior(config, action_dim, self.device, model)
            self.tuner = VLMTuner(self.prior, config.tuner, seed=config.seed)
            self._prior_noise = torch.Generator().manual_seed(config.seed)
            self.labeller = None
            if config.vlm.background:
                self.labeller = PriorLabeller(
                    self.prior,
                    self.buffer,
                    lambda ids: vlm_images(config, self.buffer, ids),
                    temperature=config.vlm.temperature,
                    generator=self._prior_noise,
                    trust=Trust.of(config),
                    confidence=config.covr.confidence,
                )
            self.rounds = Rounds(
                config, self.agent, self.buffer, self.tuner, self.labeller, self._keep_weights
            )
        self.collector = Collector(self.envs, self.buffer)
        self.evaluations = Evaluations(config, self.agent, self.prior)
        self.transcript = Transcript(self.out, config, self.prior, self.buffer)
        self.counters = Counters()
        self.clock = Clock()
        self._rng = np.random.default_rng(config.seed)
        self._lane = Lane(self.device, urgent=True)
        self._metrics = MeanMetrics()
        self._callbacks: list[Callable[[Rows], object]] = []
        if saved:
            self._restore(saved)
        self._logged_returns = len(self.counters.returns)

    @property
    def step(self) -> int:
        """Environment steps so far, summed over environments: decisions times env.action_repeat."""
        return self.counters.step

    def on_step(self, callback: Callable[[Rows], object]) -> None:
        """Calls `callback(rows)` at the end of every turn of the loop, in the thread that calls `run`.

        That is once per decision of a batch of environments. By then its transitions `rows` (see envs.Rows)
        are in the replay buffer, the next decisions of these environments are simulating, and the policy
        updates, the fine-tuning round, the metrics, the evaluation and the checkpoint that were due are done.
        An exception that the callback raises ends the run like an error in the loop. Callbacks are called in
        the order in which they were given.
        """
        self._callbacks.append(callback)

    # ---- a run -------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Trains to config.steps and returns the summary, which is also in summary.json.

        An interrupt (Ctrl-C) ends the run after the step in progress: the run is saved for a later resume,
        and KeyboardInterrupt is raised.

        Raises:
            UserError: the folder is another run's, or cannot be written (for example a full disk; the message
                says what was saved), or training diverged.
        """
        torch.set_num_threads(self.threads)  # a trainer that was built later may have changed it
        with self.folder.claimed(resume=self._continues is not None), os_error_as_user_error():
            if self._continues is not None and Checkpoint(self.out).written != self._continues:
                raise UserError(
                    f"the run in {self.out} has gone on since this trainer was built: build it again"
                )
            drop_staged(self.out)  # of a process that was killed
            write_whole(self.out / "config.json", json.dumps(self.config.to_dict(), indent=2) + "\n")
            write_prompt(self.out, self.prior, (self.config.env.height, self.config.env.width))
            self.transcript.resume(self.step)
            self.clock.start()
            with (
                RunLogger(self.out, self.config.steps, self.clock, start=self.step) as self._log,
                self.envs,
                self._lane.work(),
                reserved_room(self.out, self.agent),
            ):
                summary = self._run()
            finished = f"the run is finished, and covr-fast report {self.out} draws it again"
            with os_error_as_user_error(finished):
                plot_curves(self.out)
            return summary

    def _run(self) -> dict[str, Any]:
        log = self._log
        self._saver = saver = RunSaver(
            self.config, self.out, self.agent, self.prior, self.buffer, self.counters, self._state_dict, log
        )
        backbone = self.prior.backbone
        log.say(f"attention of the VLM: {backbone.attention} ({backbone.attention_reason})")
        for doubt in self.config.doubts():
            log.say(f"note: {doubt}")
        with saver.saved_on(Exception, KeyboardInterrupt), self.clock("evaluation"):
            self.evaluations.measure_before(self.step, log)
        with saver.saved_on(Exception), deferred_interrupts() as interrupted:
            try:
                self._train(interrupted)
            finally:  # a round that is still running is dropped
                self.tuner.stop()
                if self.labeller is not None:
                    self.labeller.close()
        if interrupted:
            saver.save_for_resume("interrupted")
            raise KeyboardInterrupt
        saver.save_last(with_replay=self.config.save_replay)
        with saver.saved_on(Exception, KeyboardInterrupt), self.clock("evaluation"):
            evaluations = self.evaluations.measure_after(self.step, log)
        summary = self._summary(evaluations)
        write_whole(self.out / "summary.json", json.dumps(summary, indent=2) + "\n")
        returns = {name: e.returns.tolist() for name, e in evaluations.items()}
        if (vlm := self.out / "checkpoint" / "vlm").is_dir():  # nobody has taken it away meanwhile
            with os_error_as_user_error("the run is finished but for the model card of its VLM"):
                write_run_card(vlm, self._state_dict(), returns)
        if self.config.video:
            from .video import record_episode

            with os_error_as_user_error("the run is finished but for this video"):
                record_episode(self.config, self.agent, self.prior, self.out)
        return summary

    # ---- the loop ----------------------------------------------------------------------------------

    def _train(self, interrupted: list[int]) -> None:
        stored = torch.empty(0, dtype=torch.int64, device="cpu")
        obs = self.envs.reset()
        for ids in self.envs.batches():
            self._act(obs[ids], ids)
        while self.step < self.config.steps and not interrupted:
            before = self.step
            with self.clock("simulation"):
                rows = self.envs.recv()
            stored = self._store(rows)
            self._act(rows.obs, rows.env_ids)
            self._update_policy()
            version = self.prior.version
            self.rounds.advance(self.step, self._log)
            if self.prior.version > version:
                self._mask_old_priors()
            self._write_answers(stored)
            if is_due(self.config.log_every, before, self.step):
                self._log_figures()
            if is_due(self.config.eval.every, before, self.step):
                with self.clock("evaluation"):
                    self.evaluations.measure_actor(self.step, self._log)
            self._saver.save_if_due(before)
            for callback in self._callbacks:
                callback(rows)
        if not interrupted:
            self.rounds.finish(self.step, self._log)
            self._write_answers(stored)

    def _act(self, obs: np.ndarray, env_ids: np.ndarray) -> None:
        """Sends the decision for `obs`; while it is simulated, the VLM gives its prior for them."""
        with self.clock("acting"):
            self.collector.send(obs, self._decide(obs), env_ids)
        due = self._prior_due(env_ids) & (self.labeller is None)
        if due.any():
            with self.clock("prior"):
                answer = self.prior(
                    vlm_view(self.config, torch.from_numpy(obs[due])),
                    temperature=self.config.vlm.temperature,
                    generator=self._prior_noise,
                    confidence=self.config.covr.confidence,
                )
            weight: np.ndarray | float = 1.0
            if answer.confidence is not None:
                self._metrics.add({"prior_confidence": answer.confidence})
                weight = answer.confidence.cpu().numpy()
            self.collector.set_prior(answer.action.cpu().numpy(), answer.version, env_ids[due], weight)
        if self.config.vlm.between == "mask":
            self.collector.mask_prior(env_ids[~due])

    def _decide(self, obs: np.ndarray) -> np.ndarray:
        """Actions float32[n, A]: random ones during the warm-up, then the actor's."""
        if self.step < self.config.warmup:
            return self._rng.uniform(-1, 1, (len(obs), *self.envs.action_shape)).astype(np.float32)
        action = self.agent.act(agent_view(self.config, torch.from_numpy(obs))).cpu().numpy()
        if not np.isfinite(action).all():
            raise DivergedError(f"the actor's actions are NaN at step {self.step}")
        return action

    def _prior_due(self, env_ids: np.ndarray) -> np.ndarray:
        """bool[n], whether the VLM is asked about the latest decision of each of these environments."""
        repeat, every = self.config.env.action_repeat, self.config.vlm.every
        due = [k == 0 or is_due(every, (k - 1) * repeat, k * repeat) for k in self.collector.latest(env_ids)]
        return np.array(due, bool)

    def _store(self, rows: Rows) -> Tensor:
        """The new transitions' ids int64[n]."""
        with self.clock("replay"):
            stored, returns = self.collector.store(rows)
        if self.labeller is not None:
            with self.clock("prior"):
                self.labeller.due(stored[torch.from_numpy(self._prior_due(rows.env_ids))].tolist())
                self.labeller.step()
        self.counters.returns += returns
        self.counters.decisions += len(rows.env_ids)
        self.counters.step += len(rows.env_ids) * self.config.env.action_repeat
        self.counters.frames += rows.frames
        self.agent.observe_decisions(self.counters.decisions)
        return stored

    def _write_answers(self, stored: Tensor) -> None:
        with self.clock("prior"):
            if self.labeller is None:
                self.transcript.update(self.step, stored)
            elif self.labeller.latest is not None:
                self.transcript.note(self.step, *self.labeller.latest)

    def sample(self) -> Batch[Tensor]:
        """The batch of an update, on the agent's device."""
        batch: Batch[Tensor] = self._batches.sample()
        return batch if self.buffer.device == self.device else batch.to(self.device)

    def _update_policy(self) -> None:
        """As many updates as are due for the decisions since the warm-up."""
        config, counters = self.config, self.counters
        due = (counters.decisions - config.decisions(config.warmup)) // config.decisions_per_update
        while counters.updates < due:
            self._metrics.add(self._update_once())
            counters.updates += 1

    def _update_once(self) -> dict[str, Tensor]:
        guide = self.rounds.guiding
        if self.agent.draws_from(self._batches):
            with self.clock("policy update"):
                return self.agent.update_from(self._batches, guide=guide)
        with self.clock("replay"):  # sampling and updating take turns, so that each has its own time
            batch = self.sample()
        with self.clock("policy update"):
            metrics = self.agent.update(batch, guide=guide)
            if self.config.replay.sampler == "prioritized":
                self.buffer.update_priorities(batch.index, metrics["td_error"])
        return metrics

    @property
    def _oldest_guiding(self) -> int:
        return Trust.of(self.config).oldest(self.prior.version)

    def _mask_old_priors(self) -> None:
        """Masks the priors that are trusted no more: see staleness.Trust."""
        mask_older(self.buffer, self._oldest_guiding)
        self.collector.mask_older(self._oldest_guiding)

    def _keep_weights(self) -> None:
        """Before a round's weights replace those of the round before."""
        self._saver.keep_round(self.rounds.records)

    # ---- figures -----------------------------------------------------------------------------------

    def _log_figures(self) -> None:
        counters, rounds = self.counters, self.rounds
        figures = self._metrics.read()
        if self.labeller is not None:
            figures |= self.labeller.metrics.read()
        figures |= {f"time/{name}": share for name, share in self.clock.shares().items()}
        figures |= {
            "decisions": counters.decisions,
            "frames": counters.frames,
            "updates": counters.updates,
            "steps_per_second": counters.step / self.clock.total,
            "guided": float(rounds.guiding),
            **age_figures(self.buffer, self.prior.version, self._oldest_guiding),
        }
        if new := counters.returns[self._logged_returns :]:
            figures["episode_return"] = float(np.mean(new))
        self._logged_returns = len(counters.returns)
        self._log.scalars(self.step, figures)
        recent = counters.returns[-20:]
        shown = {
            "return": f"{np.mean(recent):.0f}" if recent else "-",
            "rounds": str(rounds.schedule.rounds),
            "steps/s": f"{figures['steps_per_second']:.0f}",
            "updates": str(counters.updates),
        }
        self._log.progress(self.step, shown)

    def _summary(self, evaluations: dict[str, Evaluation]) -> dict[str, Any]:
        counters, seconds = self.counters, self.clock.total
        return {
            "environment": self.config.env.id,
            "seed": self.config.seed,
            "device": str(self.device),
            "steps": counters.step,
            "decisions": counters.decisions,
            "frames": counters.frames,
            "updates": counters.updates,
            "episodes": len(counters.returns),
            "seconds": seconds,
            "steps_per_second": counters.step / seconds,
            "time_shares": self.clock.shares(),
            "rounds": self.rounds.records,
            "evaluations": {
                name: {"mean": e.mean, "std": e.std, "returns": e.returns.tolist()}
                for name, e in evaluations.items()
            },
        }

    # ---- the state of a run ------------------------------------------------------------------------

    def _state_dict(self) -> dict[str, Any]:
        """counters.pt of a checkpoint."""
        return {
            "settings": self.config.to_dict(),
            **vars(self.counters),
            **self.clock.state_dict(),
            **self.rounds.state_dict(),
            **self.evaluations.state_dict(),
            "rng": self._rng.bit_generator.state,
            "prior_noise": self._prior_noise.get_state(),
            "prior_version": self.prior.version,
            "labeller": self.labeller.state_dict() if self.labeller else None,
        }

    def _restore(self, saved: Checkpoint) -> None:
        restore_agent(self.agent, saved.folder / "agent.pt")
        state = saved.counters
        try:
            self.counters = Counters(**{name: state[name] for name in vars(self.counters)})
            self.clock.load_state_dict(state)
            self.rounds.load_state_dict(state, empty_buffer=not saved.has_replay())
            self.evaluations.load_state_dict(state)
            self._rng.bit_generator.state = state["rng"]
            self._prior_noise.set_state(state["prior_noise"])
            self.prior.version = state["prior_version"]
            if self.labeller and state["labeller"]:
                self.labeller.load_state_dict(state["labeller"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{saved.folder / 'counters.pt'} does not fit this version of covr_fast "
                f"({type(error).__name__}: {error})"
            ) from error
        self._mask_old_priors()  # the settings of trust may have changed
        self.buffer.cut()
