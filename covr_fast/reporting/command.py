"""The command that makes a run."""

import json
import shlex
from typing import Any

from ..config import TrainConfig
from ..errors import UserError
from ..files import full_names
from .runs import Run


def changed_settings(run: Run) -> dict[str, Any] | None:
    """The settings in which a run differs from its preset, in this version. None: its preset is not known."""
    try:
        preset = TrainConfig.preset(run.preset, run.model, run.kind)
    except UserError:
        return None
    own = full_names(json.loads(json.dumps(preset.to_dict())))
    named = {"begun_as", "vlm.model", "agent.kind"}
    changed = {n: v for n, v in run.settings.items() if n not in named and n in own and own[n] != v}
    usual = TrainConfig.preset(run.preset)
    chosen = {"vlm.model": (run.model, usual.vlm.model), "agent.kind": (run.kind, usual.agent.kind)}
    return {name: value for name, (value, default) in chosen.items() if value != default} | changed


def command(run: Run) -> str | None:
    """A line for the shell that begins the run anew. None: its preset is not known."""
    changed = changed_settings(run)
    if changed is None:
        return None
    words = ["covr-fast", "train", run.preset]
    for name, value in changed.items():
        words += _flag(name.replace("_", "-"), value)
    return shlex.join(words)


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        part, dot, leaf = name.rpartition(".")
        return [f"--{name}" if value else f"--{part}{dot}no-{leaf}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", str(value)]
