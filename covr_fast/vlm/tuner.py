"""Fine-tuning the VLM on the agent's own best samples (Xia et al. 2026, "RL-tuned VLM")."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..streams import Lane, mark
from .finetune.lora import add_lora, copy_weights, make_replica, trainable
from .finetune.objective import AnswerModel, RoundImages, Samples, mean_nll, weighted_loss
from .memory import out_of_memory
from .mode import own_mode
from .model.adapters import check_foldable, check_tunable
from .model.rows import training_attention
from .prior import ActionPrior


@dataclass(frozen=True)
class TunerConfig:
    """How a round of fine-tuning runs. Every round starts a fresh AdamW and its own learning-rate curve."""

    mode: Literal["lora", "full"] = "lora"
    """Train low-rank adapters of the language model's linear layers, or every weight."""
    lora_rank: int = 128
    """Rank of the adapters."""
    lora_alpha: int = 256
    """Scale of the adapters, as alpha / rank: the paper's 256 for driving, 16 for DMControl."""
    learning_rate: float = 2e-4
    """Peak of the curve: linear warm-up, then half a cosine down to zero."""
    warmup: float = 0.1
    """Share of the steps spent warming up."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are scaled down to it."""
    epochs: int = 3
    """Passes over the round's samples."""
    average: float = 0.0
    """Decay per step of a moving average of the weights, which is then what is evaluated and published: noise
    of small batches cancels in it. It starts with the round's first weights. 0 for the weights themselves."""
    max_steps: int | None = None
    """Upper limit of optimizer steps in a round; None for none."""
    batch_size: int = 64
    """Kept samples per optimizer step. Those of zero weight count in N_v and cost nothing."""
    micro_batch: int = 16
    """Samples per forward; lower it when memory runs out, the result is the same."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Lay answers of different lengths one behind the other instead of padding them, so that only attention
    sees padding, with FlashAttention not even that; the result is the same up to rounding. auto: wherever the
    attention can, which eager cannot. on: insist on it. off: pad, which FlashAttention cannot."""
    held_out: float = 0.1
    """Share of the kept samples that is not trained on and gives the reported losses. At least one where
    there are two; never the sample of the highest return."""
    label_smoothing: float = 0.1
    """Probability mass spread over the vocabulary in the training loss (the reported losses have none)."""
    shift: int = 0
    """Random shift of the frames in training, in pixels each way, for rounds of few samples; 0 for none."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    cache_image_features: bool = True
    """Run the vision tower once per frame and round where it is frozen (mode "lora", unless the prior's own
    adapter reaches it) and frames are not shifted, which changes nothing in the result; costs memory for the
    features."""
    overlap: bool = False
    """Train in a thread of its own, while the prior goes on answering and the agent on learning."""
    seed: int = 0
    """Of the held-out choice, the order of samples and the adapters' initial weights."""

    def __post_init__(self) -> None:
        if self.mode not in ("lora", "full"):
            raise ValueError(f"mode must be 'lora' or 'full', not {self.mode!r}")
        if self.packing not in ("auto", "on", "off"):
            raise ValueError(f"packing must be 'auto', 'on' or 'off', not {self.packing!r}")
        for name in ("lora_rank", "lora_alpha", "epochs", "batch_size", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1 or None, not {self.max_steps}")
        for name in ("held_out", "label_smoothing", "warmup", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if self.shift < 0:
            raise ValueError(f"shift must be at least 0, not {self.shift}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, not {self.learning_rate}")


@dataclass(frozen=True)
class RoundReport:
    """What a round of fine-tuning did."""

    round: int
    """Counted from 1."""
    samples: int
    """Kept samples the round was given."""
    trained: int
    """Samples of non-zero weight that were trained on."""
    held_out: int
    """Samples that were held out, whatever their weight, and gave the losses."""
    nonzero_share: float
    """Share of the samples with a non-zero return weight."""
    loss_before: float
    """Mean -log p per answer token of the held-out samples in nats, before the round. NaN without such."""
    loss_after: float
    """The same with the weights that the round ends with: those of its best epoch."""
    steps: int
    """Optimizer steps taken."""
    seconds: float
    """Wall time, evaluation included."""


class VLMTuner:
    """Trains a second copy of a prior's trainable weights while the prior serves the first.

    What waits for what: `start` returns at once with `overlap=True`, else when the round is done. The prior's
    weights change only inside `publish`, which waits for a running prior call to end. A round trains on from
    the tuner's own weights, whether they were published or not. On a GPU a round is queued on a stream of its
    own, behind what the caller of `start` had queued; `publish` on the prior's (see `streams`).

    A round depends on its samples, its seed and the weights only: not on the modes of torch that the caller
    has set, and dropout, that of adapters too, is off. One that was stopped or failed leaves no trace:
    neither weights nor gradients, and it is not counted.

    Args:
        prior: mode "lora" adds adapters to its model if it has none, and trains those that it has; mode
            "full" folds those that it has into its weights.

    Raises:
        ValueError: the prior's attention cannot do what `config.packing` asks for, `config.mode` does not fit
            its model, or its adapter cannot be trained.
    """

    def __init__(self, prior: ActionPrior, config: TunerConfig | None = None) -> None:
        self.prior = prior
        self.config = config = config or TunerConfig()
        self.rounds = 0
        """Rounds so far, the running one included; part of each round's seed, so set it when a run is
        resumed."""
        attention = training_attention(prior.backbone.attention, config.packing)
        self._check_mode(prior, config.mode)
        if config.mode == "lora":
            check_tunable(prior.backbone.model)
        else:
            check_foldable(prior.backbone.model)
        with prior.lock, own_mode(prior.device, grad=True):
            if config.mode == "lora":
                add_lora(prior.backbone, config.lora_rank, config.lora_alpha, config.seed)
            else:
                prior.merge_adapter()
            self._backbone = make_replica(prior.backbone, config.mode)
        self._backbone.attention = attention
        if config.gradient_checkpointing:
            self._checkpoint_activations()
        self._device = self._backbone.device
        self._lane = Lane(self._device)
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._report: RoundReport | None = None
        self._before: list[Tensor] | None = None
        """The weights before the round of `_report`, until that is asked for or published."""
        self._error: BaseException | None = None

    @property
    def parameters(self) -> int:
        """How many weights are trained."""
        return sum(p.numel() for p in trainable(self._backbone.model))

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, frames: Tensor, actions: Tensor, returns: Tensor) -> None:
        """Begins a round on the samples that the exploration filter kept.

        Args:
            frames: uint8[N, 3, H, W], what the agent saw; read until the round ends, not copied.
            actions: float[N, A] in [-1, 1], what it did.
            returns: float[N], the returns that followed.

        Raises:
            RuntimeError: a round is still running.
            ValueError, TypeError: no samples, or arguments that do not fit each other or the prior.
        """
        if self.running:
            raise RuntimeError("a round is still running; wait until poll() returns its report")
        self.check()
        with own_mode(self._device):
            self._check(frames, actions, returns)
            samples = Samples.build(self.prior.grammar, frames, actions, returns)
        self.rounds += 1
        self._stop.clear()
        self._report = self._before = None
        if not self.config.overlap:
            with self._enough_memory(), self._lane.work(frames):
                self._report = self._train(samples)
            return
        self._thread = threading.Thread(
            target=self._run,
            args=(samples, mark(self._device), torch.get_num_threads()),
            name="vlm-tuner",
            daemon=True,
        )
        self._thread.start()

    def poll(self) -> RoundReport | None:
        """The report of a round that ended since the last call, else None. Never waits.

        Raises what the tuner's thread raised, if it did.
        """
        if self.running:
            return None
        self.check()
        report, self._report, self._before = self._report, None, None
        return report

    def wait(self) -> RoundReport | None:
        """`poll()` after the running round, if any, has ended."""
        if self._thread is not None:
            self._thread.join()
        return self.poll()

    def publish(self) -> int:
        """Gives the tuned weights to the prior, between two of its calls, and returns their version.

        Raises:
            RuntimeError: a round is still running.
        """
        if self.running:
            raise RuntimeError("a round is still running; publish after poll() returns its report")
        self.check()
        with self.prior.lock, own_mode(self._device), self.prior.lane.work():
            copy_weights(self._backbone.model, self.prior.backbone.model)
            self._before = None
            self.prior.base_tuned |= self.config.mode == "full"
            return self.prior.weights_changed()

    def check(self) -> None:
        """Raises what the tuner's thread raised since the last call, if it did."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def stop(self) -> None:
        """Ends a running round within one micro-batch (or one held-out evaluation) and drops what it has
        trained so far; a round that was neither asked for its report nor published is dropped too."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._before is not None:
            with own_mode(self._device), self._lane.work():
                self._undo(self._before)
        self._thread = None
        self._report = self._before = None

    # ------------------------------------------------------------------ the round

    def _run(self, samples: Samples, ready: "torch.cuda.Event | None", threads: int) -> None:
        """The body of the thread."""
        try:
            # The order of sums, and with it the result, depends on the count: that of the caller.
            torch.set_num_threads(threads)
            with self._enough_memory(), self._lane.work(samples.frames, after=ready):
                self._report = self._train(samples)
            self._lane.synchronize()  # the report means that the weights are there
        except BaseException as error:  # handed to the caller of poll()
            self._error = error

    def _enough_memory(self) -> AbstractContextManager[None]:
        remedy = f"lower micro_batch (it is {self.config.micro_batch}) or set gradient_checkpointing"
        return out_of_memory("fine-tuning", remedy)

    def _train(self, samples: Samples) -> RoundReport | None:
        """One round; None if it was stopped."""
        report = None
        with own_mode(self._device, grad=True):
            weights = trainable(self._backbone.model)
            before = [w.detach().clone() for w in weights]
            try:
                report = self._optimize(samples, weights, before)
            finally:
                for weight in weights:
                    weight.grad = None
                if report is None:
                    self._undo(before)
                else:
                    self._before = before
        return report

    def _undo(self, before: list[Tensor]) -> None:
        """As if the last round had not been."""
        self._restore(trainable(self._backbone.model), before)
        self.rounds -= 1

    def _optimize(self, samples: Samples, weights: list[Tensor], before: list[Tensor]) -> RoundReport | None:
        """Trains `weights`, which are `before`; None if it was stopped."""
        config = self.config
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.rounds)
        held, training = self._split(samples, generator)
        size = (samples.frames.shape[2], samples.frames.shape[3])
        model = AnswerModel(
            self._backbone, self.prior.layout(size), checkpointing=config.gradient_checkpointing
        )
        optimizer = torch.optim.AdamW(
            weights, lr=config.learning_rate, weight_decay=config.weight_decay, foreach=True
        )
        per_epoch = math.ceil(len(training) / config.batch_size)
        total = min(per_epoch * config.epochs, config.max_steps or per_epoch * config.epochs)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._curve(step, total))

        trained = training[samples.weights[training] > 0]
        images = RoundImages(
            model,
            samples,
            torch.cat((trained, held)),
            cached=config.cache_image_features and config.mode == "lora" and config.shift == 0,
            micro_batch=config.micro_batch,
            shift=config.shift,
            generator=generator,
        )
        loss_before = best = mean_nll(model, samples, held, images, config.micro_batch)
        best_weights = before
        average = [w.clone() for w in before] if config.average else None
        steps = 0
        while steps < total:
            order = training[torch.randperm(len(training), generator=generator)]
            for rows in order.split(config.batch_size)[: total - steps]:
                if not self._backward(model, samples, rows, images):
                    return None
                nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                if average is not None:
                    torch._foreach_lerp_(average, [w.detach() for w in weights], 1 - config.average)
                steps += 1
            with self._holding(weights, average):
                loss = mean_nll(model, samples, held, images, config.micro_batch)
                if loss < best or len(held) == 0:
                    best, best_weights = loss, [w.detach().clone() for w in weights]
        self._restore(weights, best_weights)
        return RoundReport(
            round=self.rounds,
            samples=len(samples.weights),
            trained=len(trained),
            held_out=len(held),
            nonzero_share=float((samples.weights > 0).float().mean()),
            loss_before=loss_before,
            loss_after=best,
            steps=steps,
            seconds=time.perf_counter() - began,
        )

    def _checkpoint_activations(self) -> None:
        """Layers recompute their activations; what training mode does otherwise, such as dropout, is off."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        self._backbone.base.gradient_checkpointing_enable({"use_reentrant": False})
        for module in self._backbone.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True

    def _split(self, samples: Samples, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows held out, and all others. The best sample stays: with it there is something to train on."""
        count = len(samples.weights)
        candidates = torch.arange(count)[torch.arange(count) != samples.weights.argmax()]
        share = self.config.held_out
        number = min(max(1, round(share * count)), len(candidates)) if share > 0 else 0
        held = candidates[torch.randperm(len(candidates), generator=generator)[:number]].sort().values
        training = torch.ones(count, dtype=torch.bool)
        training[held] = False
        return held, training.nonzero()[:, 0]

    def _backward(self, model: AnswerModel, samples: Samples, rows: Tensor, images: RoundImages) -> bool:
        """Accumulates the gradient of Eq. 6 over the batch `rows`; False if a stop was asked for."""
        valid = samples.valid_tokens(rows)
        for part in samples.micro_batches(rows, self.config.micro_batch):
            if self._stop.is_set():
                return False
            smoothing = self.config.label_smoothing
            weighted_loss(model, samples, part, images.shifted(part), valid, smoothing).backward()
        return True

    def _curve(self, step: int, total: int) -> float:
        """The learning rate's factor at `step`: up linearly over the warm-up, then down a half cosine."""
        warm = max(1, round(self.config.warmup * total))
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))

    @contextmanager
    def _holding(self, weights: list[Tensor], values: list[Tensor] | None) -> Iterator[None]:
        """`weights` hold `values`, unless those are None, until the block ends."""
        if values is None:
            yield
            return
        own = [w.detach().clone() for w in weights]
        self._restore(weights, values)
        yield
        self._restore(weights, own)

    @staticmethod
    @torch.no_grad()
    def _restore(weights: list[Tensor], values: list[Tensor]) -> None:
        torch._foreach_copy_(weights, values)

    @staticmethod
    def _check_mode(prior: ActionPrior, mode: str) -> None:
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

    def _check(self, frames: Tensor, actions: Tensor, returns: Tensor) -> None:
        self.prior.check_images(frames, "frames")
        count = len(frames)
        if actions.shape != (count, self.prior.action_dim):
            raise ValueError(
                f"actions must have shape [{count}, {self.prior.action_dim}], not {tuple(actions.shape)}"
            )
        if returns.shape != (count,):
            raise ValueError(f"returns must have shape [{count}], not {tuple(returns.shape)}")
        if not torch.isfinite(returns).all() or not torch.isfinite(actions).all():
            raise ValueError("actions and returns must be finite")
