"""The command that makes a run."""

import json
import shlex
from typing import Any

from ..config import TrainConfig
from ..errors import UserError
from ..files import full_names
from ..flags import flags
from .runs import Run


def changed_settings(run: Run) -> dict[str, Any] | None:
    """The settings in which a run differs from its preset, in this version. None: its preset is not known."""
    try:
        preset = TrainConfig.preset(run.preset, run.model, run.kind, run.method)
    except UserError:
        return None
    own = full_names(json.loads(json.dumps(preset.to_dict())))
    named = {"begun_as", "vlm.model", "agent.kind", "method"}
    changed = {n: v for n, v in run.settings.items() if n not in named and n in own and own[n] != v}
    usual = TrainConfig.preset(run.preset)
    chosen = {
        "vlm.model": (run.model, usual.vlm.model),
        "agent.kind": (run.kind, usual.agent.kind),
        "method": (run.method, "covr"),
    }
    return {name: value for name, (value, default) in chosen.items() if value != default} | changed


def command(run: Run) -> str | None:
    """A line for the shell that begins the run anew. None: its preset is not known."""
    changed = changed_settings(run)
    if changed is None:
        return None
    return shlex.join(["covr-fast", "train", run.preset, *flags(changed)])
