"""Figures over time, from metrics.jsonl."""

import math
from collections.abc import Sequence

import numpy as np

from .runs import Run

Series = tuple[np.ndarray, np.ndarray]
"""Where (steps or rounds) and values, float64[points] each, in order."""


def series(run: Run, name: str) -> Series:
    """A figure of metrics.jsonl by environment steps. Where a step has several, the last counts."""
    return _sorted({m["step"]: m[name] for m in run.metrics if name in m})


def by_round(run: Run, name: str) -> Series:
    """A figure of the fine-tuning rounds' records by round."""
    return _sorted({r["round"]: r[name] for r in run.rounds if "round" in r and name in r})


def kept_share(run: Run) -> Series:
    """By round, the share of its samples that the filter kept."""
    rounds = [r for r in run.rounds if {"round", "kept", "samples"} <= r.keys() and r["samples"]]
    return _sorted({r["round"]: r["kept"] / r["samples"] for r in rounds})


def vlm_by_round(run: Run) -> Series:
    """The return of the VLM alone by the number of rounds before; 0: before any."""
    found: dict[float, float] = {}
    done = 0.0
    for m in run.metrics:
        done = m.get("round/round", done)
        for name, number in (("vlm_before", 0.0), ("vlm", done), ("vlm_after", done)):
            if (key := f"eval/{name}_mean") in m:
                found[number] = m[key]
    return _sorted(found)


def returns(runs: Sequence[Run]) -> tuple[str, list[Series]]:
    """The learning curves of a group's runs, and of what: evaluations of the actor, or of the VLM where it
    decides, if every run has them during training too, else training episodes. Short runs may have logged
    neither: the evaluation after training is their only point. Runs without a step have none."""
    decides = {run.final.policy for run in runs if run.final is not None}
    name = "eval/vlm_mean" if decides and "actor" not in decides else "eval/actor_mean"
    evaluated = [series(run, name) for run in runs]
    if all(len(steps) > 1 for steps, _ in evaluated):
        return "evaluations", evaluated
    trained = [series(run, "episode_return") for run in runs]
    if any(len(steps) for steps, _ in trained):
        return "training episodes", [own for own in trained if len(own[0])]
    ends = [
        series(run, f"eval/{run.final.policy}_mean") for run in runs if run.final is not None and run.steps
    ]
    return "evaluations", [own for own in ends if len(own[0])]


def _sorted(values: dict[float, float]) -> Series:
    finite = {where: value for where, value in values.items() if math.isfinite(value)}
    where = sorted(finite)
    return np.array(where, np.float64), np.array([finite[w] for w in where], np.float64)
