"""One round of fine-tuning: epochs of AdamW on the weighted likelihood; the best epoch's weights stay."""

import math
import threading
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.adapters import loses_too_much, lost_by_merging
from .config import TunerConfig
from .held_out import served_nll
from .lora import assign, snapshot
from .masters import Masters
from .objective import AnswerModel, RoundImages, Samples, weighted_loss
from .split import split


@dataclass(frozen=True)
class RoundReport:
    """What a round of fine-tuning did."""

    round: int
    """Counted from 1."""
    samples: int
    """Samples that the round was given."""
    trained: int
    """Samples of non-zero weight that were trained on."""
    held_out: int
    """Samples that were held out, whatever their weight, and gave the losses."""
    episodes: int
    """Episodes that the samples are of."""
    nonzero_share: float
    """Share of the samples with a non-zero return weight."""
    loss_before: float
    """Mean -log p per answer token of the held-out samples in nats, before the round. NaN without any."""
    loss_after: float
    """The same with the weights that the round ends with: those of its best epoch. Both losses are of the
    weights as they are served."""
    lora_lost: float | None
    """Share of the change by LoRA that merging it into half-precision weights would lose: see
    `model.adapters.lost_by_merging`."""
    lora_beside: bool
    """Whether LoRA is served beside the weights because of that."""
    steps: int
    """Optimizer steps taken."""
    seconds: float
    """Wall time, evaluation included."""


def run_round(
    model: AnswerModel,
    samples: Samples,
    weights: list[Tensor],
    before: list[Tensor],
    config: TunerConfig,
    seed: int,
    number: int,
    stop: threading.Event,
) -> RoundReport | None:
    """Trains `weights`, those of `model` that are trainable, and leaves them at the best epoch's values.

    Args:
        before: a snapshot of `weights`, which is only read.
        seed: with `number`, that of the order and the shifts of the samples; alone, that of the split.
        number: of the round, counted from 1.
        stop: ends the round at the next micro-batch.

    Returns:
        None if it was stopped; `weights` and their gradients are then left as they are.
    """
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    held_out, training = split(samples.weights, samples.episodes, config.held_out, seed)
    trained = training[samples.weights[training] > 0]
    images = RoundImages(model, samples, torch.cat((trained, held_out)), config, generator)
    per_epoch = math.ceil(len(training) / config.batch_size)
    total = min(per_epoch * config.epochs, config.max_steps or per_epoch * config.epochs)
    masters = Masters(weights)
    optimizer = torch.optim.AdamW(
        masters.values, lr=config.learning_rate, weight_decay=config.weight_decay, foreach=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, total, config.warmup)
    )

    def held_out_loss() -> float:
        return served_nll(model.backbone, model.layout, samples, held_out, images, config.micro_batch)

    loss_before = best = held_out_loss()
    best_weights = before
    average = snapshot(masters.values) if config.average else None
    steps = 0
    while steps < total:
        order = training[torch.randperm(len(training), generator=generator)]
        for rows in order.split(config.batch_size)[: total - steps]:
            valid = samples.valid_tokens(rows)
            for part in samples.micro_batches(rows, config.micro_batch):
                if stop.is_set():
                    return None
                features = images.shifted(part)
                weighted_loss(model, samples, part, features, valid, config.label_smoothing).backward()
                masters.collect_gradients()
            nn.utils.clip_grad_norm_(masters.values, config.max_grad_norm)
            optimizer.step()
            masters.round()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            if average is not None:
                torch._foreach_lerp_(average, [m.detach() for m in masters.values], 1 - config.average)
            steps += 1
        latest = None if average is None else snapshot(weights)
        if average is not None:
            assign(weights, average)
        loss = held_out_loss()
        if loss < best or len(held_out) == 0:
            best, best_weights = loss, snapshot(weights)
        if latest is not None:
            assign(weights, latest)
    assign(weights, best_weights)
    lora_lost = lost_by_merging(model.backbone.decoder)
    return RoundReport(
        round=number,
        samples=len(samples.weights),
        trained=len(trained),
        held_out=len(held_out),
        episodes=len(samples.episodes.unique()),
        nonzero_share=float((samples.weights > 0).float().mean()),
        loss_before=loss_before,
        loss_after=best,
        lora_lost=lora_lost,
        lora_beside=loses_too_much(lora_lost),
        steps=steps,
        seconds=time.perf_counter() - began,
    )


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """Goes up linearly over the first `warmup * total` steps, then down along a half cosine."""
    warm = max(1, round(warmup * total))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
