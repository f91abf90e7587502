"""How long a run takes here, from the parts of its loop that `bench` has timed alone."""

import math

from rich.console import Console

from .bench import Figures
from .config import TrainConfig
from .costs import in_words
from .schedule import FineTuneSchedule

_KEPT = 0.2
"""Share of D_f that EDDF keeps: the median over rounds of the racetrack's sweep (docs/results.md)."""
_STARTING = 8.0
"""Seconds in which a process starts and loads its libraries, here."""


def run_seconds(config: TrainConfig, figures: Figures) -> dict[str, float]:
    """Seconds of a whole run by part of the loop, in all "total".

    An estimate: parts that were timed alone take longer beside each other, and how many samples a round
    keeps, the run decides. With batches of environments that overlap, the simulation costs only what exceeds
    the rest of the loop.
    """
    env, repeat = config.env, config.env.action_repeat
    decisions = config.decisions(config.steps) if config.learns else 0
    after_warmup = max(0, decisions - config.decisions(config.warmup))
    simulation = figures.median("simulation") / env.num_envs
    acting = figures.median("acting") / figures.batch[0]
    prior = figures.median("prior") / figures.batch[0]
    asked = decisions / max(1.0, config.vlm.every / repeat) if config.has_agent else decisions
    updates = after_warmup / config.decisions_per_update if config.has_agent else 0
    parts = {
        "acting": acting * after_warmup,
        "policy update": (figures.median("policy update") + figures.median("replay")) * updates,
        "prior": prior * asked,
        "fine-tuning": figures.median("fine-tuning") * _tuning_steps(config),
    }
    each = config.eval.episodes * math.ceil(env.max_episode_steps / repeat)
    actor = vlm = 0
    if config.has_agent:  # that of the last step is the one after training
        actor = 1 + ((config.steps - 1) // config.eval.every if config.eval.every else 0)
    if config.has_vlm and (config.eval.vlm or not config.has_agent):
        vlm = 1 + config.has_rounds
    if not config.has_agent and config.learns and config.eval.every:
        vlm += config.steps // config.eval.every
    if config.has_rounds and config.eval.rounds:
        vlm += len(_rounds(config))
    evaluation = each * ((1 + actor + vlm) * simulation + actor * acting + vlm * prior)
    hidden = sum(parts.values()) if env.num_envs > env.batch_size else 0.0
    parts["simulation"] = max(0.0, simulation * decisions - hidden)
    parts |= {"evaluation": evaluation, "starting": _STARTING + figures.building}
    return parts | {"total": sum(parts.values())}


def _rounds(config: TrainConfig) -> list[int]:
    """The steps between rounds, one entry for each round within the run."""
    schedule, between = FineTuneSchedule(config.covr.psi_0, config.covr.schedule), []
    while schedule.due(config.steps):
        between.append(schedule.psi)
        schedule.advance()
    return between


def _tuning_steps(config: TrainConfig) -> int:
    """Optimizer steps of all rounds."""
    if not config.has_rounds:
        return 0
    tuner, steps = config.tuner, 0
    kept = config.covr.top_share if config.covr.filter == "top" else _KEPT
    for psi in _rounds(config):
        samples = kept * config.decisions(psi) * (1 - tuner.held_out)
        of_round = tuner.epochs * math.ceil(samples / tuner.batch_size)
        steps += min(of_round, tuner.max_steps or of_round)
    return steps


def print_whole_run(config: TrainConfig, figures: Figures, console: Console) -> None:
    """Prints how long a run with these settings takes, and what of it."""
    parts = run_seconds(config, figures)
    total = parts.pop("total")
    largest = sorted(parts.items(), key=lambda part: -part[1])
    shares = ", ".join(f"{name} {in_words(seconds)}" for name, seconds in largest if seconds >= 0.5)
    console.print(f"a whole run of {config.steps} steps, by its parts: {in_words(total)} ({shares})")
