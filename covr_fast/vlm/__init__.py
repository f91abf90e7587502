"""The VLM side of COVR: the action prior, which guides the agent, and the tuner, which trains on its data.

transformers and peft are imported when a name is first used, not when this package is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "ActionDistribution": "decode.likelihood",
    "ActionPrior": "prior",
    "PriorBatch": "prior",
    "RoundReport": "finetune.round",
    "TunerConfig": "finetune.config",
    "VLMTuner": "tuner",
    "task_prompt": "answer.prompt",
}

__all__ = [
    "ActionDistribution", "ActionPrior", "PriorBatch", "RoundReport", "TunerConfig", "VLMTuner",
    "task_prompt",
]  # fmt: skip

if TYPE_CHECKING:
    from .answer.prompt import task_prompt
    from .decode.likelihood import ActionDistribution
    from .finetune.config import TunerConfig
    from .finetune.round import RoundReport
    from .prior import ActionPrior, PriorBatch
    from .tuner import VLMTuner


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
