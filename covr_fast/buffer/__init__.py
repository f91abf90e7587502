"""Pixel replay: every frame stored once, every observation rebuilt exactly."""

from .batch import Batch
from .prefetch import Prefetch
from .replay import ReplayBuffer
from .samplers import Prioritized, Recent, Uniform
from .view import FineTuneView

__all__ = ["Batch", "FineTuneView", "Prefetch", "Prioritized", "Recent", "ReplayBuffer", "Uniform"]
