"""Pixel replay: every frame stored once, every observation rebuilt exactly."""

from .batch import Batch
from .replay import ReplayBuffer
from .samplers import Prioritized, Recent, Uniform
from .view import FineTuneView

__all__ = ["Batch", "FineTuneView", "Prioritized", "Recent", "ReplayBuffer", "Uniform"]
