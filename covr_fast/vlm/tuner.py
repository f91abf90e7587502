"""Fine-tuning the VLM on the agent's own best samples (Xia et al. 2026, "RL-tuned VLM")."""

import logging
import threading

import torch
from torch import Tensor

from ..streams import Lane, mark
from .finetune.config import TunerConfig
from .finetune.lora import add_lora, assign, make_replica, snapshot, trainable
from .finetune.objective import AnswerModel, Samples
from .finetune.round import RoundReport, run_round
from .memory import out_of_memory
from .mode import own_mode
from .model.adapters import MOST_LOST, check_foldable, check_tunable, lost_by_merging
from .model.rows import training_attention
from .prior import ActionPrior

log = logging.getLogger(__name__)


class VLMTuner:
    """Trains a second copy of a prior's trainable weights while the prior serves the first.

    A round starts from the weights of the round before, published or not. It depends only on these weights,
    its samples and its seed: not on the modes of torch that the caller has set, and there is no dropout. A
    round that is stopped or fails is undone and not counted.

    What waits for what: `start` returns at once if `overlap=True`, else when the round is done. The prior's
    weights change only in `publish`, which waits until a running call of the prior has ended. On a GPU the
    tuner has its own stream; a round waits there for the work that the caller of `start` had queued.
    `publish` is queued on the prior's stream (see `streams`).

    Args:
        prior: mode "lora" trains the adapters of its model, and adds some if there are none; mode "full"
            merges its adapters into its weights first.
        seed: that of the run, for a `config` that has none.

    Raises:
        ValueError: the prior's attention does not support `config.packing`, its model does not support
            `config.mode`, or its adapter cannot be trained.
    """

    def __init__(self, prior: ActionPrior, config: TunerConfig | None = None, *, seed: int = 0) -> None:
        self.prior = prior
        self.config = config = config or TunerConfig()
        self.seed = seed if config.seed is None else config.seed
        self.rounds = 0
        """Rounds so far, with the running one. It is part of each round's seed: set it to resume a run."""
        attention = training_attention(prior.backbone.attention, config.packing)
        _check_mode(prior, config.mode)
        with prior.lock, own_mode(prior.device, grad=True):
            if config.mode == "lora":
                add_lora(prior.backbone, config.lora_rank, config.lora_alpha, self.seed)
            else:
                _warn_of_merge(prior)
                prior.merge_adapter()
            self._backbone = make_replica(prior.backbone, config.mode)
        self._backbone.attention = attention
        if config.gradient_checkpointing:
            self._backbone.checkpoint_activations()
        self._device = self._backbone.device
        self._lane = Lane(self._device)
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._report: RoundReport | None = None
        self._before: list[Tensor] | None = None
        """The weights before the last round, for as long as `stop` may undo it."""
        self._error: BaseException | None = None

    @property
    def parameters(self) -> int:
        """How many weights are trained."""
        return sum(p.numel() for p in trainable(self._backbone.model))

    @property
    def running(self) -> bool:
        """Whether a round is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(
        self,
        frames: Tensor,
        actions: Tensor,
        returns: Tensor,
        episodes: Tensor | None = None,
        *,
        weights: Tensor | None = None,
    ) -> None:
        """Begins a round on samples that the exploration filter selected.

        Args:
            frames: uint8[N, 3, H, W], what the agent saw. They are not copied: leave them as they are until
                the round ends.
            actions: float[N, A] in [-1, 1], what it did.
            returns: float[N], the returns that followed. Of those on a GPU the weights (RALW) are computed
                there, and the round, not its caller, waits for them.
            episodes: int64[N], the episode of each sample. An episode is held out as a whole, or not at all.
                None: every sample is an episode of its own.
            weights: float[N] in [0, 1] of the samples in the loss of Eq. 6. None: those that RALW gives their
                returns.

        Raises:
            RuntimeError: a round is still running.
            ValueError, TypeError: no samples, or arguments that do not match each other or the prior. NaN or
                infinity among returns on a GPU fails the round instead.
        """
        if self.running:
            raise RuntimeError("a round is still running; wait until poll() returns its report")
        self.check()
        with own_mode(self._device):
            _check_samples(self.prior, frames, actions, returns, episodes, weights)
            samples = Samples.build(self.prior.grammar, frames, actions, returns, episodes, weights)
        self.rounds += 1
        self._stop.clear()
        self._report = self._before = None
        if not self.config.overlap:
            self._run(samples)
            return
        arguments = (samples, mark(self._device), torch.get_num_threads())
        self._thread = threading.Thread(
            target=self._run_in_thread, args=arguments, name="vlm-tuner", daemon=True
        )
        self._thread.start()

    def poll(self) -> RoundReport | None:
        """The report of a round that ended since the last call, else None. Never waits.

        Raises the exception of a round that failed in the tuner's thread.
        """
        if self.running:
            return None
        self.check()
        report, self._report, self._before = self._report, None, None
        return report

    def wait(self) -> RoundReport | None:
        """Waits until the running round, if any, has ended; then like `poll()`."""
        if self._thread is not None:
            self._thread.join()
        return self.poll()

    def publish(self) -> int:
        """Copies the tuned weights into the prior, between two of its calls; returns their version.

        Raises:
            RuntimeError: a round is still running.
        """
        if self.running:
            raise RuntimeError("a round is still running; publish after poll() returns its report")
        self.check()
        with self.prior.lock, own_mode(self._device), self.prior.lane.work():
            assign(trainable(self.prior.backbone.model), trainable(self._backbone.model))
            self._before = None
            self.prior.base_tuned |= self.config.mode == "full"
            return self.prior.weights_changed()

    def check(self) -> None:
        """Raises the exception of a round that failed in the tuner's thread since the last call."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def stop(self) -> None:
        """Ends a running round within one micro-batch (or one held-out evaluation) and undoes it. A finished
        round is undone too, unless its report was asked for or its weights were published."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with own_mode(self._device), self._lane.work():
            self._undo()
        self._thread = self._report = None

    # ---- the round ----

    def _run_in_thread(self, samples: Samples, ready: "torch.cuda.Event | None", threads: int) -> None:
        try:
            # The order of sums, and so the result, depends on the number of threads: use the caller's.
            torch.set_num_threads(threads)
            self._run(samples, ready)
            self._lane.synchronize()  # a report says that the weights are there
        except BaseException as error:  # poll() raises it
            self._error = error

    def _run(self, samples: Samples, ready: "torch.cuda.Event | None" = None) -> None:
        """A round on the tuner's stream, after the mark `ready`, or after all of the caller's stream."""
        remedy = f"lower micro_batch (it is {self.config.micro_batch}) or set gradient_checkpointing"
        with out_of_memory("fine-tuning", remedy), self._lane.work(samples.frames, after=ready):
            self._report = self._train(samples)

    def _train(self, samples: Samples) -> RoundReport | None:
        """The report of a round. A round that is stopped (None) or fails is undone."""
        config, report = self.config, None
        with own_mode(self._device, grad=True):
            weights = trainable(self._backbone.model)
            self._before = before = snapshot(weights)
            try:
                with self.prior.lock:  # so that both are of the same size, if another thread sets it
                    self._backbone.image_size = self.prior.image_size
                    layout = self.prior.layout((samples.frames.shape[2], samples.frames.shape[3]))
                model = AnswerModel(self._backbone, layout, checkpointing=config.gradient_checkpointing)
                report = run_round(
                    model, samples, weights, before, config, self.seed, self.rounds, self._stop
                )
            finally:
                for weight in weights:
                    weight.grad = None
                if report is None:
                    self._undo()
        return report

    def _undo(self) -> None:
        """Restores the state before the last round."""
        if self._before is not None:
            assign(trainable(self._backbone.model), self._before)
            self._before = None
            self.rounds -= 1


def _check_mode(prior: ActionPrior, mode: str) -> None:
    """Raises ValueError unless the prior's model can be tuned in this mode."""
    if mode == "full" and prior.backbone.quantized:
        raise ValueError(
            "mode='full' cannot train quantized weights: take mode='lora', or open the prior with "
            "quantization='none'"
        )
    if mode == "lora" and prior.base_tuned:
        raise ValueError(
            f"mode='lora' would adapt weights that are no longer those of {prior.backbone.source!r}: "
            "save the prior and open it again, or take mode='full'"
        )
    check = check_tunable if mode == "lora" else check_foldable
    check(prior.backbone.model)


def _warn_of_merge(prior: ActionPrior) -> None:
    """Logs a warning if half-precision weights would lose much of the adapter that is merged into them."""
    lost = lost_by_merging(prior.backbone.decoder)
    if lost is not None and lost > MOST_LOST:
        log.warning(
            f"mode='full' merges the adapter into {prior.settings.dtype} weights, which loses {lost:.0%} of "
            "its change: train on with mode='lora', or open the prior with dtype=torch.float32"
        )


def _check_samples(
    prior: ActionPrior,
    frames: Tensor,
    actions: Tensor,
    returns: Tensor,
    episodes: Tensor | None,
    weights: Tensor | None,
) -> None:
    prior.check_images(frames, "frames")
    count = len(frames)
    if actions.shape != (count, prior.action_dim):
        raise ValueError(f"actions must have shape [{count}, {prior.action_dim}], not {tuple(actions.shape)}")
    if returns.shape != (count,):
        raise ValueError(f"returns must have shape [{count}], not {tuple(returns.shape)}")
    if episodes is not None and (episodes.dtype != torch.int64 or episodes.shape != (count,)):
        got = f"{episodes.dtype} {tuple(episodes.shape)}"
        raise ValueError(f"episodes must be int64 of shape [{count}], not {got}")
    if not torch.isfinite(actions).all() or (returns.is_cpu and not torch.isfinite(returns).all()):
        raise ValueError("actions and returns must be finite")
    if weights is not None:
        if weights.shape != (count,):
            raise ValueError(f"weights must have shape [{count}], not {tuple(weights.shape)}")
        if weights.is_cpu and not ((weights >= 0) & (weights <= 1)).all():
            raise ValueError("weights must lie in [0, 1]")
