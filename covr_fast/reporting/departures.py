"""In which settings a run departs from what covr_fast takes for a row of the paper's tables."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from ..config import TrainConfig
from ..errors import UserError
from ..paper import PaperTask
from ..sweeps.spec import SHIPPED, read_spec
from .command import changed_settings
from .groups import SAME_RESULT, Group

_SAID = {"steps", "eval.episodes", "agent.kind", "method", "vlm.model"}
"""Settings that have remarks of their own."""
_MEMORY = {"tuner.micro_batch", "tuner.packing", "tuner.gradient_checkpointing", "tuner.cache_image_features"}
"""Settings of memory and speed."""
_ROLES = {"covr.vlm", "covr.decides"}
_OF_ROUNDS = (
    "tuner.", "covr.psi_0", "covr.schedule", "covr.threshold", "covr.entropy", "covr.filter",
    "covr.top_share", "covr.z_score", "covr.score", "covr.weights", "covr.min_samples", "covr.horizon",
    "covr.bootstrap", "covr.publish_after",
)  # fmt: skip
"""Beginnings of the names of what only rounds of fine-tuning read."""
_OF_UPDATES = (
    "agent.", "decisions_per_update", "replay.batch_size", "replay.n_step", "replay.sampler",
    "replay.best_share", "replay.augment", "replay.pad",
)  # fmt: skip
"""The same of what only an agent's updates read."""


def departures(group: Group, task: PaperTask) -> tuple[str, dict[str, Any]]:
    """The settings in which a group departs from the nearest of what comes with covr_fast for the task, the
    agent and the method: the preset, or rows of the sweeps; and the words for that ("the preset’s")."""
    found = []
    for whose, config in _references(task, group.model, group.kind, group.method):
        changed = changed_settings(group.settings, config)
        found.append(
            (whose, {name: value for name, value in changed.items() if _counts(name, group.settings)})
        )
    return min(found, key=lambda each: len(each[1]), default=("the preset’s", {}))


def _references(task: PaperTask, model: str, kind: str, method: str) -> Iterator[tuple[str, TrainConfig]]:
    try:
        yield "the preset’s", TrainConfig.preset(task.preset, model, kind, method)
    except UserError:  # a kind of agent that this version does not have
        return
    for name, config in _rows_of_sweeps(model):
        if (config.begun_as, config.agent.kind, config.method) == (task.preset, kind, method):
            yield f"those of the sweep {name}", config


@cache
def _rows_of_sweeps(model: str) -> list[tuple[str, TrainConfig]]:
    """Each group of the sweeps that come with covr_fast, as the settings of a run."""
    specs = [read_spec(str(path), seeds=1, model=model) for path in sorted(SHIPPED.glob("*.toml"))]
    return [(spec.name, run.config) for spec in specs for run in spec.runs]


def _counts(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether a setting changes the outcome of a run with these settings, and has no remark of its own."""
    if name in SAME_RESULT | _SAID | _MEMORY:
        return False
    if name in _ROLES:
        return True
    unused: tuple[str, ...] = ()
    vlm = settings.get("covr.vlm")
    if vlm == "off":
        unused += ("vlm.", "tuner.", "covr.", "agent.prior_weight")
    if vlm != "tuned":
        unused += _OF_ROUNDS
    if settings.get("covr.decides") == "vlm":
        unused += _OF_UPDATES
        if vlm != "tuned":  # it is only evaluated
            unused += ("replay.", "covr.", "warmup")
    return not name.startswith(unused)
