"""The COVR loop (Xia et al. 2026, Alg. 1)."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import __version__
from .agents import Agent, Guidance, make_agent
from .best_returns import BestReturns
from .buffer import Batch
from .callbacks import Callback
from .checkpoint import NO_VLM, Checkpoint, reserved_room, restore_agent
from .collect import Collector
from .config import TrainConfig, located
from .digits import returns_text
from .envs import Rows, make_env
from .errors import DivergedError, UserError, as_user_error, os_error_as_user_error
from .evaluate import Evaluation, Evaluations
from .files import write_whole
from .host_memory import keep_freed_memory
from .logger import Clock, MeanMetrics, RunLogger
from .machine import device_name, versions
from .model_card import write_run_card
from .parts import compute_device, loop_threads, new_batches, new_buffer, replay_device, use_tensor_cores
from .report import plot_curves
from .resume import open_resumed
from .run_folder import RunFolder
from .saving import Counters, RunSaver, deferred_interrupts
from .schedule import is_due
from .seeds import training_seed
from .streams import Lane
from .versions import drop_staged
from .view import agent_obs_shape, agent_view

if TYPE_CHECKING:
    from .advisor import Advisor
    from .vlm import ActionPrior


class Trainer:
    """Trains an agent and a VLM that teach each other, and writes a run folder.

    Per decision of a batch of environments: the actor acts. While its action is simulated, the VLM gives a
    prior for the same frames if it is due, and the agent updates from the replay buffer. When a round is due,
    the episodes that finished since the last one pass the filter (EDDF) and fine-tune the VLM, weighted by
    their returns (RALW). After the cold start the VLM's priors guide the actor (Eq. 4).
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path | str | RunFolder,
        *,
        resume: bool = False,
        callbacks: Sequence[Callback] = (),
    ):
        """Builds everything, and writes nothing yet.

        Args:
            config: the settings; see TrainConfig.preset.
            out: the run folder.
            resume: continue the run in `out` from its checkpoint. Its unfinished episodes end where they were
                interrupted, and new ones start; everything else goes on as before. Settings of `config` that
                differ from those of the run take effect, or are refused (see `resume.MAY_CHANGE`).
            callbacks: what is called at the end of each turn of the loop, after rounds and after evaluations.

        Raises:
            UserError: settings that do not fit together or may not change, nothing to resume from, or another
                process is writing the run.
        """
        config.check()
        self.config = config = TrainConfig.from_dict(config.to_dict())  # the caller may change theirs
        config.vlm.model = located(config.vlm.model)  # a run may be resumed from anywhere
        self.callbacks = list(callbacks)
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
            self._agent: Agent | None = None
            if config.has_agent:
                self._agent = make_agent(
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
            self._best = BestReturns(config, self.buffer) if config.replay.sampler == "best" else None
            self.collector = Collector(self.envs, self.buffer)
            self.vlm = self._make_advisor(action_dim, saved) if config.has_vlm else None
        self.evaluations = Evaluations(config, self.out, action_dim, self._agent, self._prior)
        self.counters = Counters()
        self.clock = Clock()
        self._rng = np.random.default_rng(config.seed)
        self._lane = Lane(self.device, urgent=True)
        self._metrics = MeanMetrics()
        if saved:
            self._restore(saved)
        self._logged_returns = len(self.counters.returns)

    def _make_advisor(self, action_dim: int, saved: Checkpoint | None) -> "Advisor":
        from .advisor import Advisor  # loads transformers, which a run without a VLM does without

        return Advisor(
            self.config,
            self.out,
            self.collector,
            self.buffer,
            self._agent,
            self.device,
            action_dim=action_dim,
            saved=saved,
            keep_weights=self._keep_weights,
        )

    @property
    def step(self) -> int:
        """Environment steps so far, summed over environments: decisions times env.action_repeat."""
        return self.counters.step

    @property
    def agent(self) -> Agent:
        """The agent; a run with covr.decides="vlm" has none."""
        assert self._agent is not None, "covr.decides='vlm' trains no agent"
        return self._agent

    @property
    def prior(self) -> "ActionPrior":
        """The VLM; a run with covr.vlm="off" has none."""
        assert self._prior is not None, "covr.vlm='off' loads no VLM"
        return self._prior

    @property
    def _prior(self) -> "ActionPrior | None":
        return None if self.vlm is None else self.vlm.prior

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
            if self.vlm is not None:
                self.vlm.begin(self.step)
            self.evaluations.resume(self.step)
            self.clock.start()
            with (
                RunLogger(self.out, self.config.steps, self.clock, start=self.step) as self._log,
                self.envs,
                self._lane.work(),
                reserved_room(self.out, self._agent),
            ):
                summary = self._run()
            finished = f"the run is finished, and covr-fast report {self.out} draws it again"
            with os_error_as_user_error(finished):
                plot_curves(self.out)
            return summary

    def _run(self) -> dict[str, Any]:
        log = self._log
        self._saver = saver = RunSaver(
            self.config,
            self.out,
            self._agent,
            self._prior if self.config.has_rounds else None,
            self.buffer,
            self.counters,
            self._state_dict,
            log,
        )
        if self.vlm is not None:
            backbone = self.vlm.prior.backbone
            log.say(f"attention of the VLM: {backbone.attention} ({backbone.attention_reason})")
            for doubt in self.config.doubts():
                log.say(f"note: {doubt}")
        with saver.saved_on(Exception, KeyboardInterrupt), self.clock("evaluation"):
            self._report(self.evaluations.measure_before(self.step, log))
        with saver.saved_on(Exception), deferred_interrupts() as interrupted:
            try:
                if self.config.learns:
                    self._train(interrupted)
            finally:  # a round that is still running is dropped
                if self.vlm is not None:
                    self.vlm.stop()
        if interrupted:
            saver.save_for_resume("interrupted")
            raise KeyboardInterrupt
        saver.save_last(with_replay=self.config.save_replay)
        with saver.saved_on(Exception, KeyboardInterrupt), self.clock("evaluation"):
            self._report(self.evaluations.measure_after(self.step, log))
        summary = self._summary()
        write_whole(self.out / "summary.json", json.dumps(summary, indent=2) + "\n")
        returns = {name: e.returns.tolist() for name, e in self.evaluations.results.items()}
        if (vlm := self.out / "checkpoint" / "vlm").is_dir():  # nobody has taken it away meanwhile
            with os_error_as_user_error("the run is finished but for the model card of its VLM"):
                write_run_card(vlm, self._state_dict(), returns)
        if self.config.video:
            from .video import record_episode

            with os_error_as_user_error("the run is finished but for this video"):
                record_episode(self.config, self._agent, self._prior, self.out)
        return summary

    def _report(self, results: dict[str, Evaluation]) -> None:
        """Tells the callbacks of these evaluations."""
        for policy, result in results.items():
            for callback in self.callbacks:
                callback.on_evaluation(self, policy, result)

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
            if self.vlm is not None:
                self._end_of_round(self.vlm.advance(self.step, self._log))
                self.vlm.write_answers(self.step, stored, self.clock)
            if is_due(self.config.log_every, before, self.step):
                self._log_figures()
            # An actor is the same after training as at its last step, and is evaluated once.
            last = self._agent is not None and self.step >= self.config.steps
            if is_due(self.config.eval.every, before, self.step) and not last:
                with self.clock("evaluation"):
                    self._report(self.evaluations.measure_policy(self.step, self._log))
            self._saver.save_if_due(before)
            for callback in self.callbacks:
                callback.on_step(self, rows)
        if self.vlm is not None and not interrupted:
            self._end_of_round(self.vlm.finish(self.step, self._log))
            self.vlm.write_answers(self.step, stored, self.clock)

    def _end_of_round(self, ended: bool) -> None:
        """What follows the end of a round of fine-tuning."""
        if not ended:
            return
        for callback in self.callbacks:
            callback.on_round(self, self._records[-1])
        if self.config.eval.rounds:
            with self.clock("evaluation"):
                self._report(self.evaluations.measure_vlm(self.step, self._log))

    def _act(self, obs: np.ndarray, env_ids: np.ndarray) -> None:
        """Sends the decision for `obs`; while it is simulated, the VLM gives its prior for them."""
        if self._agent is None:
            assert self.vlm is not None
            with self.clock("prior"):
                action = self.vlm.answer(obs).action.cpu().numpy()
            self.collector.send(obs, action, env_ids)
            return
        with self.clock("acting"):
            self.collector.send(obs, self._decide(obs), env_ids)
        if self.vlm is not None:
            self.vlm.advise(obs, env_ids, self.clock)

    def _decide(self, obs: np.ndarray) -> np.ndarray:
        """Actions float32[n, A]: random ones during the warm-up, then the actor's."""
        if self.step < self.config.warmup:
            return self._rng.uniform(-1, 1, (len(obs), *self.envs.action_shape)).astype(np.float32)
        action = self.agent.act(agent_view(self.config, torch.from_numpy(obs))).cpu().numpy()
        if not np.isfinite(action).all():
            raise DivergedError(f"the actor's actions are NaN at step {self.step}")
        return action

    def _store(self, rows: Rows) -> Tensor:
        """The new transitions' ids int64[n]."""
        counters = self.counters
        before = counters.decisions
        with self.clock("replay"):
            stored, returns = self.collector.store(rows)
        if self.vlm is not None:
            self.vlm.label(stored, rows.env_ids, self.clock)
        counters.returns += returns
        counters.decisions += len(rows.env_ids)
        counters.step += len(rows.env_ids) * self.config.env.action_repeat
        counters.frames += rows.frames
        if self._best is not None:
            with self.clock("replay"):
                self._best.added(stored, before, counters.decisions)
        if self._agent is not None:
            self._agent.observe_decisions(counters.decisions)
        return stored

    def sample(self) -> Batch[Tensor]:
        """The batch of an update, on the agent's device."""
        batch: Batch[Tensor] = self._batches.sample()
        return batch if self.buffer.device == self.device else batch.to(self.device)

    def _update_policy(self) -> None:
        """As many updates as are due for the decisions since the warm-up."""
        if self._agent is None:
            return
        config, counters = self.config, self.counters
        due = (counters.decisions - config.decisions(config.warmup)) // config.decisions_per_update
        if counters.updates < due and config.covr.decay:
            self._agent.weigh_prior(self._prior_weight)
        while counters.updates < due:
            self._metrics.add(self._update_once(self._agent))
            counters.updates += 1

    @property
    def _prior_weight(self) -> float:
        """lambda of Eq. 4 at this step."""
        config, left = self.config, 1.0
        if config.covr.decay:
            left = max(0.0, 1 - self.step / (config.covr.decay * config.steps))
        return left * config.agent.prior_weight

    def _update_once(self, agent: Agent) -> dict[str, Tensor]:
        guide = self.vlm is not None and self.vlm.guiding
        if agent.draws_from(self._batches):
            with self.clock("policy update"):
                return agent.update_from(self._batches, guide=guide)
        with self.clock("replay"):  # sampling and updating take turns, so that each has its own time
            batch = self.sample()
        with self.clock("policy update"):
            metrics = agent.update(batch, guide=guide)
            if self.config.replay.sampler == "prioritized":
                self.buffer.update_priorities(batch.index, metrics["td_error"])
        return metrics

    @property
    def _records(self) -> list[dict[str, float]]:
        """What summary.json says of each finished round."""
        return [] if self.vlm is None or self.vlm.rounds is None else self.vlm.rounds.records

    def _keep_weights(self) -> None:
        """Before a round's weights replace those of the round before."""
        self._saver.keep_round(self._records)

    # ---- figures -----------------------------------------------------------------------------------

    def _log_figures(self) -> None:
        counters = self.counters
        figures = self._metrics.read()
        if self.vlm is not None:
            figures |= self.vlm.figures()
        if self.config.covr.decay:
            figures["prior_weight"] = self._prior_weight
        figures |= {f"time/{name}": share for name, share in self.clock.shares().items()}
        figures |= {
            "decisions": counters.decisions,
            "frames": counters.frames,
            "updates": counters.updates,
            "steps_per_second": counters.step / self.clock.total,
        }
        if new := counters.returns[self._logged_returns :]:
            figures["episode_return"] = float(np.mean(new))
        self._logged_returns = len(counters.returns)
        self._log.scalars(self.step, figures)
        recent = counters.returns[-20:]
        shown = {
            "return": returns_text(float(np.mean(recent)), decimals=0) if recent else "-",
            "rounds": str(len(self._records)),
            "steps/s": f"{figures['steps_per_second']:.0f}",
            "updates": str(counters.updates),
        }
        self._log.progress(self.step, shown)

    def _summary(self) -> dict[str, Any]:
        counters, seconds = self.counters, self.clock.total
        return {
            "environment": self.config.env.id,
            "preset": self.config.begun_as,
            "method": self.config.method,
            "seed": self.config.seed,
            "device": str(self.device),
            "machine": device_name(self.device),
            "versions": {"covr-fast": __version__, **versions()},
            "steps": counters.step,
            "decisions": counters.decisions,
            "frames": counters.frames,
            "updates": counters.updates,
            "episodes": len(counters.returns),
            "seconds": seconds,
            "steps_per_second": counters.step / seconds,
            "time_shares": self.clock.shares(),
            "rounds": self._records,
            "policy": self.evaluations.policy,
            "evaluations": {
                name: {"mean": e.mean, "std": e.std, "returns": e.returns.tolist()}
                for name, e in self.evaluations.results.items()
            },
        }

    # ---- the state of a run ------------------------------------------------------------------------

    def _state_dict(self) -> dict[str, Any]:
        """counters.pt of a checkpoint."""
        return {
            "settings": self.config.to_dict(),
            **vars(self.counters),
            **self.clock.state_dict(),
            **NO_VLM,
            **(self.vlm.state_dict() if self.vlm is not None else {}),
            **self.evaluations.state_dict(),
            "rng": self._rng.bit_generator.state,
        }

    def _restore(self, saved: Checkpoint) -> None:
        if self._agent is not None:
            restore_agent(self._agent, saved.folder / "agent.pt")
        state = saved.counters
        try:
            self.counters = Counters(**{name: state[name] for name in vars(self.counters)})
            self.clock.load_state_dict(state)
            self.evaluations.load_state_dict(state)
            self._rng.bit_generator.state = state["rng"]
            if self.vlm is not None:
                self.vlm.load_state_dict(state, empty_buffer=not saved.has_replay())
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{saved.folder / 'counters.pt'} does not fit this version of covr_fast "
                f"({type(error).__name__}: {error})"
            ) from error
        if self.vlm is not None:
            self.vlm.mask_old_priors()  # the settings of trust may have changed
        self.buffer.cut()
