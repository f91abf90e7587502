"""Pixel replay: every frame stored once, every observation rebuilt exactly."""

from .._C import FrameStackError
from .batch import Batch
from .finetune import FineTuneView
from .prefetch import Prefetch
from .replay import ReplayBuffer
from .samplers import Prioritized, Recent, Uniform

__all__ = [
    "Batch",
    "FineTuneView",
    "FrameStackError",
    "Prefetch",
    "Prioritized",
    "Recent",
    "ReplayBuffer",
    "Uniform",
]
