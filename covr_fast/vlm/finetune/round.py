"""One round of fine-tuning: epochs of AdamW on the weighted likelihood; the best epoch's weights stay."""

import math
import threading
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import TunerConfig
from .lora import assign, snapshot
from .objective import AnswerModel, RoundImages, Samples, mean_nll, weighted_loss


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
    nonzero_share: float
    """Share of the samples with a non-zero return weight."""
    loss_before: float
    """Mean -log p per answer token of the held-out samples in nats, before the round. NaN without any."""
    loss_after: float
    """The same with the weights that the round ends with: those of its best epoch."""
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
    number: int,
    stop: threading.Event,
) -> RoundReport | None:
    """Trains `weights`, those of `model` that are trainable, and leaves them at the best epoch's values.

    Args:
        before: a snapshot of `weights`, which is only read.
        number: of the round, counted from 1; part of its seed.
        stop: ends the round at the next micro-batch.

    Returns:
        None if it was stopped; `weights` and their gradients are then left as they are.
    """
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
    held_out, training = split(samples.weights, config.held_out, generator)
    trained = training[samples.weights[training] > 0]
    images = RoundImages(model, samples, torch.cat((trained, held_out)), config, generator)
    per_epoch = math.ceil(len(training) / config.batch_size)
    total = min(per_epoch * config.epochs, config.max_steps or per_epoch * config.epochs)
    optimizer = torch.optim.AdamW(
        weights, lr=config.learning_rate, weight_decay=config.weight_decay, foreach=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, total, config.warmup)
    )

    loss_before = best = mean_nll(model, samples, held_out, images, config.micro_batch)
    best_weights = before
    average = snapshot(before) if config.average else None
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
            nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            if average is not None:
                torch._foreach_lerp_(average, [w.detach() for w in weights], 1 - config.average)
            steps += 1
        latest = None if average is None else snapshot(weights)
        if average is not None:
            assign(weights, average)
        loss = mean_nll(model, samples, held_out, images, config.micro_batch)
        if loss < best or len(held_out) == 0:
            best, best_weights = loss, snapshot(weights)
        if latest is not None:
            assign(weights, latest)
    assign(weights, best_weights)
    return RoundReport(
        round=number,
        samples=len(samples.weights),
        trained=len(trained),
        held_out=len(held_out),
        nonzero_share=float((samples.weights > 0).float().mean()),
        loss_before=loss_before,
        loss_after=best,
        steps=steps,
        seconds=time.perf_counter() - began,
    )


def split(weights: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows that are held out and rows to train on, for samples of return weights float32[N].

    At least one row is held out if `share` > 0 and N > 1. The sample with the largest weight is never held
    out, so there is always something to train on.
    """
    count = len(weights)
    candidates = torch.arange(count)[torch.arange(count) != weights.argmax()]
    number = min(max(1, round(share * count)), len(candidates)) if share > 0 else 0
    held_out = candidates[torch.randperm(len(candidates), generator=generator)[:number]].sort().values
    training = torch.ones(count, dtype=torch.bool)
    training[held_out] = False
    return held_out, training.nonzero()[:, 0]


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """Goes up linearly over the first `warmup * total` steps, then down along a half cosine."""
    warm = max(1, round(warmup * total))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
