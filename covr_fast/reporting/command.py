"""The command that makes a run."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from ..config import TrainConfig
from ..errors import UserError
from ..files import full_names
from ..flags import flags
from .runs import Run


def changed_settings(settings: Mapping[str, Any], reference: TrainConfig) -> dict[str, Any]:
    """The settings, by full names, that are not those of the reference, as far as this version has them."""
    own = full_names(json.loads(json.dumps(reference.to_dict())))
    return {name: value for name, value in settings.items() if name in own and own[name] != value}


def _chosen(run: Run) -> dict[str, Any] | None:
    """What has to be said of a run to begin it anew from its preset. None: its preset is not known."""
    try:
        preset = TrainConfig.preset(run.preset, run.model, run.kind, run.method)
    except UserError:
        return None
    named = {"begun_as", "vlm.model", "agent.kind", "method"}
    changed = {n: v for n, v in changed_settings(run.settings, preset).items() if n not in named}
    usual = TrainConfig.preset(run.preset)
    chosen = {
        "vlm.model": (run.model, usual.vlm.model),
        "agent.kind": (run.kind, usual.agent.kind),
        "method": (run.method, "covr"),
    }
    return {name: value for name, (value, default) in chosen.items() if value != default} | changed


def command(run: Run) -> str | None:
    """A line for the shell that begins the run anew. None: its preset is not known."""
    chosen = _chosen(run)
    if chosen is None:
        return None
    return shlex.join(["covr-fast", "train", run.preset, *flags(chosen)])
