"""How long the parts of a run's loop take on this machine. Each is checked before it is timed."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from .config import TrainConfig
from .report import new_table
from .rounds import vlm_images
from .trainer import Trainer
from .view import agent_view, vlm_view
from .vlm import ActionPrior


class CheckFailedError(RuntimeError):
    """A part computes something wrong, so its speed means nothing."""


IMAGE_SIZES = (0, 112, 168, 224, 336, 448)
"""Values of vlm.image_size that are compared."""


@dataclass(frozen=True)
class Timing:
    """One part of the loop."""

    part: str
    """Its name in a run's shares of wall time."""
    call: str
    """What one call does."""
    checked: str
    """What was found true before it was timed."""
    seconds: np.ndarray
    """float64[n], one per call."""


@dataclass(frozen=True)
class SizeTiming:
    """The VLM's answers to frames of one `vlm.image_size`."""

    image_size: int
    tokens: int
    """Image tokens of a frame."""
    seconds: np.ndarray
    """float64[n], one per batch."""


@dataclass(frozen=True)
class Figures:
    """What `measure` found."""

    parts: list[Timing]
    building: float
    """Seconds that it took to build the run: environments, networks, the VLM."""
    batch: tuple[int, ...]
    """Shape [B, 3, H, W] of the frames that the VLM was asked about."""
    sizes: list[SizeTiming]
    """Only sizes that change the number of tokens, and the one in use. None in a run without a VLM."""

    def median(self, part: str) -> float:
        """Seconds of a call of this part; 0 if the run has none."""
        return next((float(np.median(t.seconds)) for t in self.parts if t.part == part), 0.0)


def measure(config: TrainConfig, seconds: float, *, sizes: bool = True) -> Figures:
    """Builds what `covr-fast train` builds with these settings, and times each part alone for `seconds`, and
    with `sizes` as long the VLM with other sizes of frames.

    Raises:
        CheckFailedError: a part is wrong.
        UserError: the settings do not fit together.
    """
    began = time.perf_counter()
    trainer = Trainer(config, Path("unused"))  # it writes nothing before it runs
    built = time.perf_counter() - began
    with trainer.envs:
        simulation, stored = _simulation(trainer, seconds)
        images = vlm_view(config, torch.from_numpy(stored[-1].obs))
        parts = [simulation, _replay(trainer, seconds, stored)]
        if config.has_vlm:
            parts.append(_prior(trainer, seconds, images))
        if config.has_agent:
            parts += [_acting(trainer, seconds, stored[-1].obs), _update(trainer, seconds)]
        compared = _image_sizes(trainer, seconds, images) if config.has_vlm and sizes else []
        if config.has_rounds:
            parts.append(_tuning(trainer, seconds))  # last: it changes the VLM's weights
        return Figures(parts, built, tuple(images.shape), compared)


def print_figures(figures: Figures, console: Console) -> None:
    """Prints a line per part, with the spread over its calls, and what was checked; and a line per size."""
    numbers = ("median ms", "10-90 %", "calls/s")
    table = new_table("one part at a time, nothing beside it", ("part", "one call"), numbers)
    for t in figures.parts:
        low, median, high = np.quantile(t.seconds, [0.1, 0.5, 0.9]) * 1000
        table.add_row(t.part, t.call, f"{median:.2f}", f"{low:.2f}-{high:.2f}", f"{1000 / median:.0f}")
    console.print(table)
    for t in figures.parts:
        console.print(f"checked before: {t.part}: {t.checked}")

    if not figures.sizes:
        return
    count, _, height, width = figures.batch
    title = f"what the VLM sees: answers for {count} frames of {height}x{width}"
    table = new_table(title, ["vlm.image_size"], ["tokens a frame", "median ms", "answers/s"])
    for size in figures.sizes:
        median = float(np.median(size.seconds))
        name = str(size.image_size) if size.image_size else "0: as they are"
        table.add_row(name, str(size.tokens), f"{1000 * median:.2f}", f"{count / median:.0f}")
    console.print(table)
    tried = ", ".join(map(str, IMAGE_SIZES))
    console.print(f"tried: {tried}; a size without a line has as many tokens as one with a line")


class _Stored(NamedTuple):
    """A batch of decisions as it was given to the replay buffer."""

    ids: Tensor
    obs: np.ndarray
    next_obs: np.ndarray


def _simulation(trainer: Trainer, seconds: float) -> tuple[Timing, list[_Stored]]:
    """Random decisions, in overlapping batches as in a run, and the newest of them. The replay buffer, which
    stores them, refuses rows that do not continue their environment's stream."""
    envs, rng = trainer.envs, np.random.default_rng(0)
    acted_on = envs.reset()

    def send(obs: np.ndarray, ids: np.ndarray) -> None:
        action = rng.uniform(-1, 1, (len(ids), *envs.action_shape)).astype(np.float32)
        acted_on[ids] = obs
        trainer.collector.send(obs, action, ids)
        trainer.collector.set_prior(action, 0, ids)

    for ids in envs.batches():
        send(acted_on[ids], ids)
    stored: list[_Stored] = []
    took: list[float] = []
    # At least until an update can draw a batch.
    begun = trainer.config.decisions(trainer.config.warmup)
    while len(trainer.buffer) < begun or sum(took) < seconds:
        start = time.perf_counter()
        # Every environment once: batches overlap, so the time of one alone would be too short.
        for _ in envs.batches():
            rows = envs.recv()
            added, _ = trainer.collector.store(rows)
            stored = [*stored[-7:], _Stored(added, acted_on[rows.env_ids], rows.next_obs)]
            send(rows.obs, rows.env_ids)
        took.append(time.perf_counter() - start)
    env = trainer.config.env
    call = f"{env.num_envs} x {env.action_repeat} frames"
    checked = f"{len(trainer.buffer)} transitions continue one another"
    return Timing("simulation", call, checked, np.array(took)), stored


def _replay(trainer: Trainer, seconds: float, stored: list[_Stored]) -> Timing:
    """Batches like those of an update. What was stored last must come back bit for bit."""
    for s in stored:
        batch = trainer.buffer.get(s.ids, n_step=1, dtype=torch.uint8)
        for ours, given in ((batch.obs, s.obs), (batch.next_obs, s.next_obs)):
            if not np.array_equal(ours.cpu().numpy(), given):
                raise CheckFailedError("replay: observations come back other than they were stored")
    n = sum(len(s.ids) for s in stored)
    took = _times(trainer, seconds, trainer.sample)
    replay = trainer.config.replay
    call = f"batch of {replay.batch_size}, {replay.augment}"
    return Timing("replay", call, f"{n} transitions come back bit for bit", took)


def _prior(trainer: Trainer, seconds: float, images: Tensor) -> Timing:
    """Answers for a batch of environments, checked against transformers' own generate()."""
    equal = _check_answers(trainer.prior, images)
    took = _times(trainer, seconds, lambda: trainer.prior(images))
    call = f"{len(images)} frames, {trainer.config.vlm.model}"
    return Timing("prior", call, f"{equal} of {len(images)} answers as by transformers' generate()", took)


def _check_answers(prior: ActionPrior, images: Tensor) -> int:
    """How many answers are those of generate(). In float32 all must be."""
    answers, truth = prior(images), prior.reference(images)
    equal = int((answers.token_ids.cpu() == truth.token_ids.cpu()).all(1).sum())
    # In half precision, rounding decides between two tokens that are about equally likely.
    if equal < len(images) and next(prior.backbone.base.parameters()).dtype == torch.float32:
        raise CheckFailedError(f"prior: {len(images) - equal} of {len(images)} answers are not generate()'s")
    return equal


def _image_sizes(trainer: Trainer, seconds: float, images: Tensor) -> list[SizeTiming]:
    """The same for other sizes of what the VLM sees, in `seconds` in all. A frame is checked for each."""
    prior, used = trainer.prior, trainer.prior.image_size
    tokens: dict[int, int] = {}
    for size in sorted({*IMAGE_SIZES, used}):
        if size == 0 or size >= prior.backbone.token_side:
            prior.image_size = size
            tokens[size] = len(prior.layout((images.shape[2], images.shape[3])).image_at)
    counts = list(tokens.values())
    shown = [size for i, size in enumerate(tokens) if size == used or counts[i] not in counts[:i]]
    timings = []
    try:
        for size in shown:
            prior.image_size = size
            _check_answers(prior, images[:1])
            took = _times(trainer, seconds / len(shown), lambda: prior(images), least=2)
            timings.append(SizeTiming(size, tokens[size], took))
    except MemoryError:
        pass  # nor do larger frames fit
    finally:
        prior.image_size = used
    return timings


def _acting(trainer: Trainer, seconds: float, obs: np.ndarray) -> Timing:
    """The actor's decisions for a batch of environments."""
    view = agent_view(trainer.config, torch.from_numpy(obs))
    action = trainer.agent.act(view)
    if not (action.abs() <= 1).all():  # nor are NaN
        raise CheckFailedError("acting: an action lies outside [-1, 1]")
    took = _times(trainer, seconds, lambda: trainer.agent.act(view).cpu())
    return Timing("acting", f"{len(obs)} frames", "actions lie in [-1, 1]", took)


def _tuning(trainer: Trainer, seconds: float) -> Timing:
    """An optimizer step of a round: the difference between rounds of four steps and of one, so without the
    held-out loss of each epoch. With RALW, a fifth of the samples have a weight, as in docs/results.md."""
    assert trainer.vlm is not None
    assert trainer.vlm.tuner is not None
    tuner, batch = trainer.vlm.tuner, trainer.config.tuner.batch_size
    ids = trainer.buffer.sample(
        math.ceil(4 * batch / (1 - trainer.config.tuner.held_out)), dtype=torch.uint8
    ).index
    images, actions = vlm_images(trainer.config, trainer.buffer, ids), trainer.buffer.actions(ids)
    weights = torch.ones(len(ids), dtype=torch.float32)
    if trainer.config.covr.weights == "returns":
        weights[torch.arange(len(ids)) % 5 > 0] = 0

    def round_of(steps: int) -> float:
        tuner.config = replace(trainer.config.tuner, epochs=1, max_steps=steps, overlap=False)
        began = time.perf_counter()
        tuner.start(images, actions, weights, weights=weights)
        report = tuner.wait()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        if report is None or report.steps != steps:
            raise CheckFailedError("fine-tuning: a round did not make its steps")
        if report.held_out and not math.isfinite(report.loss_after):
            raise CheckFailedError("fine-tuning: the held-out loss is not finite")
        return time.perf_counter() - began

    round_of(1)
    took: list[float] = []
    while sum(took) < seconds or len(took) < 2:
        took.append(max(0.0, round_of(4) - round_of(1)) / 3)
    call = f"a step of {batch} samples, {float(weights.mean()):.0%} with a weight"
    return Timing("fine-tuning", call, "rounds make their steps, losses are finite", np.array(took))


def _update(trainer: Trainer, seconds: float) -> Timing:
    """Guided updates, all on one batch. Where the actor, or the targets, have a turn in every n-th update
    only, a time is the mean of n updates."""
    batch = trainer.sample()
    weights = list(trainer.agent.modules()["actor"].parameters())
    before = [p.detach().clone() for p in weights]
    metrics = trainer.agent.update(batch, guide=True)
    moved = any((a != b).any() for a, b in zip(before, weights, strict=True))
    if not moved or not all(torch.isfinite(value).all() for value in metrics.values()):
        raise CheckFailedError("policy update: the actor did not move, or a loss is not finite")
    turn = math.lcm(trainer.agent.config.actor_every, trainer.agent.config.target_every)

    def one_turn() -> None:
        for _ in range(turn):
            trainer.agent.update(batch, guide=True)

    took = _times(trainer, seconds, one_turn) / turn
    call = f"batch of {len(batch.reward)}"
    return Timing("policy update", call, "the actor moves, losses are finite", took)


def _times(trainer: Trainer, seconds: float, call: Callable[[], object], *, least: int = 5) -> np.ndarray:
    """float64[n], n >= `least`: seconds of each call but the first, for at least `seconds` in all."""
    took: list[float] = []
    while sum(took[1:]) < seconds or len(took) < 1 + least:
        start = time.perf_counter()
        call()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        took.append(time.perf_counter() - start)
    return np.array(took[1:])
