"""The COVR loop (Xia et al. 2026, Alg. 1)."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from . import _C, ops
from .agents import SAC
from .agents.sac import TransitionBatch
from .buffer import Batch, FineTuneView, ReplayBuffer
from .checkpoint import (
    RESCUED,
    Checkpoint,
    load_checkpoint,
    rescue_agent,
    reserved_room,
    restore_agent,
    save_checkpoint,
)
from .config import TrainConfig
from .envs import PixelEnvs, Rows, action_labels, make_env
from .errors import UserError, as_user_error
from .evaluate import Evaluation, Policy, actor_policy, evaluate, random_policy, vlm_policy
from .files import write_whole
from .labeller import PriorLabeller
from .logger import Clock, MeanMetrics, RunLogger
from .report import plot_curves
from .resume import open_resumed
from .run_folder import RunFolder
from .schedule import FineTuneSchedule
from .seeds import training_seed
from .streams import Lane
from .view import agent_obs_shape, agent_view, newest_frame, vlm_view
from .vlm import ActionPrior, VLMTuner


@dataclass
class _Decision:
    """What each environment is doing: its decision has been sent, its outcome has not come back."""

    obs: np.ndarray
    action: np.ndarray
    prior: np.ndarray
    prior_mask: np.ndarray
    prior_version: np.ndarray
    due: np.ndarray
    """Whether the VLM is to label the decision in the background."""


@dataclass
class _Round:
    """A round of fine-tuning that has begun, and how things were before it, should it not end."""

    step: int
    figures: dict[str, float]
    finished: dict[str, Tensor]
    tuner_rounds: int


class _Diverged(UserError):
    """The networks hold NaN, so nothing of the run's present state is worth saving."""


_REMEDY = ": training diverged; lower agent.lr, or look at the settings that were changed"


CHECKPOINT_SHARE = 0.02
"""Of a run's time, what regular checkpoints take at most."""


class Trainer:
    """Trains an agent and a VLM that teach each other, and writes a run folder.

    Per decision of a batch of environments: the actor acts; its action simulates while the VLM, when it is
    due, gives a prior for the same frames and the agent updates from the replay buffer. When a round is due
    the episodes that finished since the last one pass the filter (EDDF) and fine-tune the VLM, weighted by
    their returns (RALW). After the cold start its priors guide the actor (Eq. 4).
    """

    def __init__(self, config: TrainConfig, out: Path | str | RunFolder, *, resume: bool = False):
        """Builds everything, and writes nothing yet.

        Args:
            config: the settings; see TrainConfig.preset.
            out: the run folder.
            resume: continue the run in `out` from its checkpoint. Its unfinished episodes end where they were
                cut and new ones start; everything else goes on as it was. Settings of `config` that differ
                from those of the run take effect, or are refused (see `resume.MAY_CHANGE`).

        Raises:
            UserError: settings that do not fit together or may not change, nothing to resume from, or a run
                that is going on.
        """
        config.check()
        self.config = config = TrainConfig.from_dict(config.to_dict())  # the caller may change theirs
        if config.vlm.model != "nano" and Path(config.vlm.model).is_dir():
            config.vlm.model = str(Path(config.vlm.model).resolve())  # wherever the run is resumed from
        self.folder = out if isinstance(out, RunFolder) else RunFolder(out)
        self.out = self.folder.path
        self._resumed = resume
        if resume:
            with self.folder.claimed(resume=True):
                self._build(open_resumed(self.out, config))
        else:
            self._build(None)

    def _build(self, saved: Checkpoint | None) -> None:
        config = self.config
        self.device = _device(config.device)
        # The simulator keeps a core of its own: two pools on the same cores wait for each other.
        self.threads = config.threads or max(1, (os.cpu_count() or 2) - config.env.num_threads)
        # Before anything is computed: even the initial weights depend on it, through the order of sums.
        torch.set_num_threads(self.threads)
        self._continues = saved.written if saved else None
        self.step = saved.counters["step"] if saved else 0
        env_seed = training_seed(config.env.seed, config.seed, self.step, config.env.num_envs)
        self.envs: PixelEnvs = make_env(replace(config.env, seed=env_seed))
        (action_dim,) = self.envs.action_shape
        with as_user_error():
            self.agent = SAC(
                agent_obs_shape(config),
                self.envs.action_shape,
                config.agent,
                device=self.device,
                seed=config.seed,
            )
            replay = saved is not None and saved.holds_replay()  # a run whose steps are done needs none
            self.buffer = (
                saved.buffer(self._replay_device()) if saved and replay else self._new_buffer(action_dim)
            )
            self.finished = FineTuneView(
                self.buffer,
                gamma=config.replay.gamma,
                horizon=config.covr.horizon,
                bootstrap=self._values_after if config.covr.bootstrap else None,
            )
            if saved is None:
                self.prior = load_prior(config, action_dim, self.device, config.vlm.model)
            else:
                with saved.opening(saved.vlm):
                    self.prior = load_prior(config, action_dim, self.device, saved.vlm)
            self.tuner = VLMTuner(self.prior, config.tuner)
        self._lane = Lane(self.device, urgent=True)
        self.schedule = FineTuneSchedule(config.covr.psi_0, config.covr.schedule)
        self.rng = np.random.default_rng(config.seed)
        self.frames = 0
        self.updates = 0
        self.rounds: list[dict[str, float]] = []
        self.returns: list[float] = []
        n = config.env.num_envs
        self._running_return = np.zeros(n)
        self._decisions = np.zeros(n, np.int64)
        self._doing = _Decision(
            np.zeros((n, *self.envs.obs_shape), np.uint8),
            np.zeros((n, action_dim), np.float32),
            np.zeros((n, action_dim), np.float32),
            np.zeros(n, np.float32),
            np.full(n, -1),
            np.zeros(n, bool),
        )
        self._prior_noise = torch.Generator().manual_seed(config.seed)
        self._before: dict[str, Evaluation] = {}
        self._earlier: tuple[dict[str, float], float] = ({}, 0.0)  # seconds by activity, and in all
        self._round: _Round | None = None
        self._saved_at = self._saving_took = 0.0
        self._labeller: PriorLabeller | None = None
        if config.vlm.background:
            self._labeller = PriorLabeller(
                self.prior,
                self.buffer,
                self._vlm_images,
                temperature=config.vlm.temperature,
                generator=self._prior_noise,
            )
        self._metrics = MeanMetrics()
        self._said_waiting = False
        if saved:
            self._restore(saved)
        self._logged_returns = len(self.returns)

    def _replay_device(self) -> str:
        name = self.config.replay.device
        if name == "auto":  # without CUDA kernels the frames stay on the host, and batches are sent over
            return "cuda" if self.device.type == "cuda" and _C.with_cuda else "cpu"
        if name == "cuda" and not torch.cuda.is_available():
            raise UserError("replay.device='cuda' but torch sees no CUDA device: use --replay.device auto")
        return name

    def _new_buffer(self, action_dim: int) -> ReplayBuffer:
        config = self.config
        return ReplayBuffer(
            config.replay.capacity,
            num_envs=config.env.num_envs,
            obs_shape=self.envs.obs_shape,
            action_shape=self.envs.action_shape,
            frame_stack=config.env.frame_stack,
            n_step=config.replay.n_step,
            gamma=config.replay.gamma,
            sampler=config.replay.sampler,
            device=self._replay_device(),
            seed=config.seed,
            extras={"prior": (action_dim,), "prior_mask": (), "prior_version": ((), torch.int64)},
        )

    # ---- the loop ----------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Trains to config.steps and returns the summary, which is also in summary.json.

        An interrupt (Ctrl-C) is honoured after the step in progress: the run is saved, to be resumed, and
        KeyboardInterrupt is raised.

        Raises:
            UserError: the folder is another run's, or cannot be written (a full disk, say; the message tells
                what was saved), or training diverged.
        """
        torch.set_num_threads(self.threads)  # another trainer may have been built since
        with self.folder.claimed(resume=self._resumed), _writing_errors():
            if self._continues is not None and load_checkpoint(self.out).written != self._continues:
                raise UserError(
                    f"the run in {self.out} has gone on since this trainer was built: build it again"
                )
            write_whole(self.out / "config.json", json.dumps(self.config.to_dict(), indent=2) + "\n")
            self.clock = Clock(*self._earlier)
            self._saved_at = time.perf_counter()
            with (
                RunLogger(self.out, self.config.steps, self.clock, start=self.step) as self.log,
                self.envs,
                self._lane.work(),
                reserved_room(self.out, self.agent),
            ):
                summary = self._run()
            with _writing_errors(f"the run is finished, and covr-fast report {self.out} draws it again"):
                plot_curves(self.out)
            return summary

    def _run(self) -> dict[str, Any]:
        for doubt in self.config.doubts():
            self.log.say(f"note: {doubt}")
        with self._kept(Exception, KeyboardInterrupt), self.clock("evaluation"):
            self._evaluate_before()
        with self._kept(Exception), _deferred_interrupt() as interrupted, self._background():
            self._train(interrupted)
        if interrupted:
            self.log.say(f"interrupted at step {self.step}: saving")
        self._save_last(with_replay=bool(interrupted) or self.config.save_replay)
        if interrupted:
            self.log.say(f"interrupted at step {self.step} and saved: --resume {self.out} continues")
            raise KeyboardInterrupt
        with self._kept(Exception, KeyboardInterrupt), self.clock("evaluation"):
            evaluations = self._before | self._evaluate_after()
        summary = self._summary(evaluations)
        write_whole(self.out / "summary.json", json.dumps(summary, indent=2) + "\n")
        if self.config.video:
            with _writing_errors("the run is finished but for this video"):
                self._record()
        return summary

    @contextmanager
    def _kept(self, *endings: type[BaseException]) -> Iterator[None]:
        """Saves the run, to be resumed, if the block ends with one of these."""
        try:
            yield
        except _Diverged:
            raise  # an earlier checkpoint is worth more than one of NaN
        except endings as error:
            what = "interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__
            self.log.say(f"{what} at step {self.step}: saving")
            self._save_last(with_replay=True)
            self.log.say(f"{what} at step {self.step} and saved: --resume {self.out} continues")
            if isinstance(error, MemoryError):
                raise UserError(str(error)) from error
            raise

    @contextmanager
    def _background(self) -> Iterator[None]:
        """Leaves no thread behind when the loop ends: a round that has not ended by then is dropped."""
        try:
            yield
        finally:
            self.tuner.stop()
            if self._labeller is not None:
                self._labeller.close()

    def _train(self, interrupted: list[int]) -> None:
        config = self.config
        obs = self.envs.reset()
        for ids in self.envs.batches():
            self._act(obs[ids], ids)
        while self.step < config.steps and not interrupted:
            with self.clock("simulation"):
                rows = self.envs.recv()
            before = self.step
            self._store(rows)
            self._act(rows.obs, rows.env_ids)
            self._update_policy()
            self._fine_tune()
            if self.step // config.log_every > before // config.log_every:
                self._log()
            if config.eval.every and self.step // config.eval.every > before // config.eval.every:
                with self.clock("evaluation"):
                    self._evaluate("actor", actor_policy(self.agent, config))
            if self._checkpoint_due(before):
                self._checkpoint()
        if self._round is not None and not interrupted:
            self._end_round(self._round, wait=True)

    def _act(self, obs: np.ndarray, ids: np.ndarray) -> None:
        """Sends the actor's decision for obs; while it simulates, the VLM gives its prior for them."""
        with self.clock("acting"):
            if self.step < self.config.warmup:
                action = self.rng.uniform(-1, 1, (len(ids), *self.envs.action_shape)).astype(np.float32)
            else:
                action = self.agent.act(agent_view(self.config, torch.from_numpy(obs))).cpu().numpy()
                if not np.isfinite(action).all():
                    raise _Diverged(f"the actor's actions are NaN at step {self.step}{_REMEDY}")
            self.envs.send(action, ids)
        doing = self._doing
        doing.obs[ids], doing.action[ids] = obs, action
        # All environments of a batch have made the same number of decisions, so they are due together.
        due = self._decisions[ids[0]] % self.config.vlm.every == 0
        doing.due[ids] = due and self._labeller is not None
        if due and self._labeller is None:
            with self.clock("prior"):
                answer = self.prior(
                    vlm_view(self.config, torch.from_numpy(obs)),
                    temperature=self.config.vlm.temperature,
                    generator=self._prior_noise,
                )
            doing.prior[ids], doing.prior_mask[ids] = answer.action.cpu().numpy(), 1.0
            doing.prior_version[ids] = answer.version
        elif self.config.vlm.between == "mask":
            doing.prior_mask[ids] = 0.0
        self._decisions[ids] += 1

    def _store(self, rows: Rows) -> None:
        ids, doing = rows.env_ids, self._doing
        with self.clock("replay"):
            stored = self.buffer.add(
                doing.obs[ids],
                doing.action[ids],
                rows.reward,
                rows.next_obs,
                rows.terminated,
                rows.truncated,
                env_ids=ids,
                prior=doing.prior[ids],
                prior_mask=doing.prior_mask[ids],
                prior_version=doing.prior_version[ids],
            )
        if self._labeller is not None:
            with self.clock("prior"):
                self._labeller.due(stored[torch.from_numpy(doing.due[ids])].tolist())
                self._labeller.step()
        done = rows.terminated | rows.truncated
        doing.prior_mask[ids[done]] = 0.0  # a held prior ends with its episode
        self._running_return[ids] += rows.reward
        self.returns += self._running_return[ids[done]].tolist()
        self._running_return[ids[done]] = 0.0
        self.step += len(ids)
        self.frames += rows.frames

    def sample(self) -> Batch:
        """The batch of an update, on the agent's device."""
        replay = self.config.replay
        batch = self.buffer.sample(
            replay.batch_size,
            augment=None if replay.augment == "none" else replay.augment,
            pad=replay.pad,
            memory_format=torch.channels_last,
        )
        return batch if self.buffer.device.type == self.device.type else batch.to(self.device)

    def _update_policy(self) -> None:
        """As many updates as are owed for the steps since the warm-up."""
        config = self.config
        owed = (self.step - config.warmup) // config.steps_per_update
        guide = self.schedule.rounds >= config.covr.cold_start
        while self.updates < owed:
            with self.clock("replay"):
                batch = self.sample()
            with self.clock("policy update"):
                metrics = self.agent.update(cast(TransitionBatch, batch), guide=guide)
                if config.replay.sampler == "prioritized":
                    self.buffer.update_priorities(batch.index, metrics["td_error"])
            self._metrics.add(metrics)
            self.updates += 1

    # ---- the VLM learns from the agent ------------------------------------------------------------

    def _fine_tune(self) -> None:
        """Begins a round that is due and publishes one that is done: in one step, unless it overlaps."""
        if self._round is None and self.schedule.due(self.step):
            self._begin_round()
        if self._round is not None:
            after = self.config.covr.publish_after
            if after is None:
                self._end_round(self._round, wait=False)
            elif self.step >= self._round.step + after:
                self._end_round(self._round, wait=True)
            else:
                self.tuner.check()

    def _begin_round(self) -> None:
        """EDDF on D_f, RALW fine-tuning on what it keeps; waits while too few episodes have finished."""
        covr = self.config.covr
        if len(self.finished) < covr.min_samples:
            if not self._said_waiting:
                self.log.say(
                    f"round {self.schedule.rounds + 1} waits: D_f holds {len(self.finished)} samples of "
                    f"finished episodes, it needs covr.min_samples={covr.min_samples}"
                )
                self._said_waiting = True
            return
        self._said_waiting = False
        with self.clock("fine-tuning"):
            indices, returns = self.finished.indices, self.finished.returns
            entropy = self._policy_entropy(indices)
            kept = ops.exploration_filter(returns, entropy, threshold=covr.threshold)
            figures = {
                "round": self.schedule.rounds + 1,
                "samples": len(returns),
                "entropy": entropy,
                "tau": kept.tau,
                "cutoff": kept.cutoff,
                "kept": len(kept.indices),
                "overwritten": self.finished.overwritten,
                **self._kept_by_time(kept.indices),
            }
            if overwritten := self.finished.overwritten:
                self.log.say(
                    f"round {self.schedule.rounds + 1}: {overwritten} steps were overwritten in the replay "
                    f"buffer before D_f was read: raise replay.capacity={self.config.replay.capacity}"
                )
            self._round = _Round(self.step, figures, self.finished.state_dict(), self.tuner.rounds)
            self.finished.clear()
            if len(kept.indices) < 2:
                self.log.say(
                    f"the filter kept {len(kept.indices)} samples: nothing to fine-tune on in this round"
                )
                return
            ids = indices[kept.indices]
            # The images are copies, so the ring may overwrite its frames while the round runs.
            self.tuner.start(self._vlm_images(ids), self.buffer.actions(ids), returns[kept.indices])

    def _end_round(self, begun: _Round, *, wait: bool) -> None:
        """Publishes and logs the round if it is done, or once it is with `wait`."""
        with self.clock("fine-tuning"):
            if self.tuner.running and not wait:
                return
            report = self.tuner.wait()
            if report:
                begun.figures |= {
                    "nonzero_share": report.nonzero_share,
                    "tuning_seconds": report.seconds,
                }
                if report.held_out:
                    begun.figures |= {"loss_before": report.loss_before, "loss_after": report.loss_after}
                self.tuner.publish()
                if self._labeller is not None and self.config.vlm.refresh_priors:
                    self._labeller.refresh()
        self._round = None
        self.rounds.append({"step": begun.step, "published": self.step, **begun.figures})
        self.log.scalars(self.step, {f"round/{name}": value for name, value in begun.figures.items()})
        self.log.say(_round_line(self.rounds[-1]))
        self.schedule.advance()

    def _values_after(self, ids: Tensor) -> Tensor:
        """float32[n], the critic's value of the observations that followed these transitions."""
        obs = cast(Tensor, self.buffer.get(ids, n_step=1, dtype=torch.uint8).next_obs)
        return self.agent.value(agent_view(self.config, obs))

    def _vlm_images(self, ids: Tensor) -> Tensor:
        """uint8[n, 3, H, W], what the VLM sees of these transitions; a copy."""
        stored = self.buffer.observations if self.config.vlm.motion else self.buffer.frames
        return vlm_view(self.config, cast(Tensor, stored(ids)))

    def _policy_entropy(self, indices: Tensor) -> float:
        """e_t: minus the mean log-probability of actions on the newest samples of D_f, in nats."""
        # Ids grow with time in every stream, so the largest are the newest of all environments.
        newest = indices.topk(min(256, len(indices))).values
        obs = cast(Tensor, self.buffer.observations(newest))
        return self.agent.entropy(agent_view(self.config, obs))

    def _kept_by_time(self, kept: Tensor) -> dict[str, float]:
        """Share of each quarter of the episodes that EDDF kept: late steps have smaller returns-to-go."""
        time = self.finished.time_in_episode
        quarter = (4 * time / (time.max() + 1)).long()
        all_, kept_ = torch.bincount(quarter, minlength=4), torch.bincount(quarter[kept], minlength=4)
        return {f"kept_share_quarter_{i + 1}": float(kept_[i] / max(int(all_[i]), 1)) for i in range(4)}

    # ---- figures -----------------------------------------------------------------------------------

    def _log(self) -> None:
        new = self.returns[self._logged_returns :]
        self._logged_returns = len(self.returns)
        figures = self._metrics.read()
        figures |= {f"time/{name}": share for name, share in self.clock.shares().items()}
        figures |= {
            "frames": self.frames,
            "updates": self.updates,
            "steps_per_second": self.step / self.clock.total,
            "guided": float(self.schedule.rounds >= self.config.covr.cold_start),
        }
        if new:
            figures["episode_return"] = float(np.mean(new))
        self.log.scalars(self.step, figures)
        recent = self.returns[-20:]
        self.log.progress(
            self.step,
            {
                "return": f"{np.mean(recent):.0f}" if recent else "-",
                "rounds": str(self.schedule.rounds),
                "steps/s": f"{figures['steps_per_second']:.0f}",
                "updates": str(self.updates),
            },
        )

    def _evaluate(self, name: str, policy: Policy) -> Evaluation:
        result = evaluate(policy, self.config.env, self.config.eval.episodes, seed=self.config.eval.seed)
        self.log.scalars(self.step, {f"eval/{name}_mean": result.mean, f"eval/{name}_std": result.std})
        self.log.say(f"{name}: {result.mean:.0f} ± {result.std:.0f} over {len(result.returns)} episodes")
        return result

    def _evaluate_before(self) -> None:
        """Measures what was there before any training, where an earlier part of the run has not."""
        policies = {"random": random_policy(self.agent.action_dim, self.config.seed)}
        if self.config.eval.vlm and self.prior.version == 0:  # a tuned VLM cannot be measured untuned
            policies["vlm_before"] = vlm_policy(self.prior, self.config)
        for name, policy in policies.items():
            if name not in self._before:
                self._before[name] = self._evaluate(name, policy)

    def _evaluate_after(self) -> dict[str, Evaluation]:
        results = {"actor": self._evaluate("actor", actor_policy(self.agent, self.config))}
        if self.config.eval.vlm:
            results["vlm_after"] = self._evaluate("vlm_after", vlm_policy(self.prior, self.config))
        return results

    def _record(self) -> None:
        """Writes a video of an evaluation episode with the actor's actions and the VLM's priors."""
        from .video import EpisodeVideo

        config = self.config
        video = EpisodeVideo(action_labels(config.env), fps=50 / config.env.action_repeat)

        def watch(obs: np.ndarray, action: np.ndarray, total: float) -> None:
            stack = torch.from_numpy(obs[None])
            prior = self.prior(vlm_view(config, stack)).action[0].cpu().numpy()
            video.add(newest_frame(config, stack)[0].numpy(), action, prior, total)

        evaluate(actor_policy(self.agent, self.config), config.env, 1, seed=config.eval.seed, watch=watch)
        video.write(self.out)

    def _checkpoint_due(self, before: int) -> bool:
        every, minutes = self.config.checkpoint_every, self.config.checkpoint_minutes
        if every and self.step // every > before // every:
            return True
        # A large replay buffer on a slow disk is written less often.
        pause = max(60 * minutes, self._saving_took / CHECKPOINT_SHARE)
        return minutes > 0 and time.perf_counter() - self._saved_at >= pause

    def _checkpoint(self) -> None:
        """A checkpoint that the run can do without."""
        try:
            self._save(with_replay=True)
        except OSError as error:
            stays = "the one before it stays" if self._has_checkpoint() else "there is none yet"
            self.log.say(
                f"no checkpoint at step {self.step} ({_reason(error)}): {stays}, and training goes on"
            )

    def _save_last(self, *, with_replay: bool) -> None:
        """The checkpoint that a run leaves; where there is no room for it, the agent alone.

        Raises:
            UserError: it could not be written; the message tells what was saved.
        """
        try:
            with _interrupt_afterwards():
                self._save(with_replay=with_replay)
        except OSError as error:
            what = f"of step {self.step}, only the agent was saved, as {self.out / RESCUED}"
            try:
                rescue_agent(self.out, self.agent)
            except OSError:
                what = f"of step {self.step}, nothing could be saved"
            stays = f"; --resume {self.out} goes on from the checkpoint before it"
            raise UserError(f"{_reason(error)}: {what}{stays if self._has_checkpoint() else ''}") from error

    def _has_checkpoint(self) -> bool:
        return any((self.out / name).is_dir() for name in ("checkpoint", "checkpoint.old"))

    def _save(self, *, with_replay: bool) -> None:
        """Writes a checkpoint in the place of the former one.

        Raises:
            OSError: it could not be written, and the former one is still there.
            _Diverged: there is nothing worth saving.
        """
        if not all(torch.isfinite(p).all() for m in self.agent.modules().values() for p in m.parameters()):
            raise _Diverged(f"the agent's weights are NaN at step {self.step}{_REMEDY}")
        started = time.perf_counter()
        buffer = self.buffer if with_replay else None
        try:
            with self.clock("checkpoint"):
                save_checkpoint(self.out, self.agent, self.prior, self._counters(), buffer)
        finally:
            self._saved_at = time.perf_counter()
            self._saving_took = self._saved_at - started

    def _counters(self) -> dict[str, Any]:
        return {
            "settings": self.config.to_dict(),
            "step": self.step,
            "frames": self.frames,
            "updates": self.updates,
            "rounds": self.rounds,
            "returns": self.returns,
            "rounds_done": self.schedule.rounds,
            "tuner_rounds": self._round.tuner_rounds if self._round else self.tuner.rounds,
            "rng": self.rng.bit_generator.state,
            "prior_noise": self._prior_noise.get_state(),
            "prior_version": self.prior.version,
            "labeller": self._labeller.state_dict() if self._labeller else None,
            "before": {name: e.returns.tolist() for name, e in self._before.items()},
            "seconds": self.clock.seconds,
            "total_seconds": self.clock.total,
            "finished": self._round.finished if self._round else self.finished.state_dict(),
        }

    def _restore(self, saved: Checkpoint) -> None:
        restore_agent(self.agent, saved.agent_state(), saved.folder / "agent.pt")
        try:
            self._restore_counters(saved)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{saved.folder / 'counters.pt'} does not fit this version of covr_fast "
                f"({type(error).__name__}: {error})"
            ) from error
        self.buffer.cut()

    def _restore_counters(self, saved: Checkpoint) -> None:
        counters = saved.counters
        self.frames, self.updates = counters["frames"], counters["updates"]
        self.rounds, self.returns = counters["rounds"], counters["returns"]
        covr = self.config.covr
        self.schedule = FineTuneSchedule(covr.psi_0, covr.schedule, rounds=counters["rounds_done"])
        self.tuner.rounds = counters["tuner_rounds"]
        self.rng.bit_generator.state = counters["rng"]
        self._prior_noise.set_state(counters["prior_noise"])
        self.prior.version = counters["prior_version"]
        if self._labeller and counters["labeller"]:
            self._labeller.load_state_dict(counters["labeller"])
        self._before = {name: Evaluation(np.array(r)) for name, r in counters["before"].items()}
        self._earlier = counters["seconds"], counters["total_seconds"]
        if saved.holds_replay():
            self.finished.load_state_dict(counters["finished"])

    def _summary(self, evaluations: dict[str, Evaluation]) -> dict[str, Any]:
        seconds = self.clock.total
        return {
            "environment": self.config.env.id,
            "seed": self.config.seed,
            "device": str(self.device),
            "steps": self.step,
            "frames": self.frames,
            "updates": self.updates,
            "episodes": len(self.returns),
            "seconds": seconds,
            "steps_per_second": self.step / seconds,
            "time_shares": self.clock.shares(),
            "rounds": self.rounds,
            "evaluations": {
                name: {"mean": e.mean, "std": e.std, "returns": e.returns.tolist()}
                for name, e in evaluations.items()
            },
        }


def load_prior(config: TrainConfig, action_dim: int, device: torch.device, model: str | Path) -> ActionPrior:
    """The VLM in `model` with the settings of config.vlm.

    Raises:
        UserError: a file of it is damaged. Else as ActionPrior.from_pretrained.
    """
    dtypes = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    try:
        return ActionPrior.from_pretrained(
            model,
            action_dim=action_dim,
            prompt=config.vlm.prompt,
            decimals=config.vlm.decimals,
            attention=config.vlm.attention,
            dtype=dtypes[config.vlm.dtype],
            device=device,
            seed=config.seed,
            quantization=None if config.vlm.quantization == "auto" else config.vlm.quantization,
            graph=config.vlm.graph,
        )
    except (OSError, ValueError, RuntimeError, MemoryError):
        raise
    except Exception as error:  # safetensors and tokenizers tell of damaged files by errors of their own
        raise UserError(f"{model} cannot be opened: {' '.join(str(error).split())}") from error


@contextmanager
def _deferred_interrupt() -> Iterator[list[int]]:
    """Collects interrupts in the list it yields instead of raising; a second Ctrl-C raises at once.

    SIGINT is one, and SIGTERM and SIGHUP (of which a dropped terminal may send several) where the program
    handles them.
    """
    received: list[int] = []

    def handle(number: int, _frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received  # signals reach the main thread only
        return
    handled = [n for n in (signal.SIGTERM, signal.SIGHUP) if callable(signal.getsignal(n))]
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, *handled)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _interrupt_afterwards() -> Iterator[None]:
    """An interrupt is honoured when the block ends, unless by an error; a second Ctrl-C at once."""
    with _deferred_interrupt() as received:
        yield
    if received:
        signal.raise_signal(received[0])


@contextmanager
def _writing_errors(consequence: str = "") -> Iterator[None]:
    """Turns errors of the operating system, such as that of a full disk, into UserErrors of one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{_reason(error)}{consequence and ': '}{consequence}") from error


def _reason(error: OSError) -> str:
    """What is wrong with which file, in one line."""
    text = error.strerror if error.errno is not None and error.strerror else str(error)
    return " ".join((f"{error.filename}: {text}" if error.filename else text).split())


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device='cuda' but torch sees no CUDA device: use --device cpu, or check `covr-fast doctor`"
        )
    return torch.device(name)


def _round_line(r: dict[str, float]) -> str:
    line = (
        f"round {r['round']:.0f} at {r['step']:.0f} steps: D_f {r['samples']:.0f}, "
        f"tau {r['tau']:.2f}, kept {r['kept']:.0f}"
    )
    if "nonzero_share" in r:
        line += f", non-zero weight {r['nonzero_share']:.0%}"
    if "loss_after" in r:
        line += f", held-out loss {r['loss_before']:.4f} -> {r['loss_after']:.4f}"
    if "tuning_seconds" in r:
        line += f", {r['tuning_seconds']:.1f} s"
    return line
