"""Pixel replay: every frame stored once, every observation rebuilt exactly."""

from .batch import Batch
from .replay import ReplayBuffer
from .view import FineTuneView

__all__ = ["Batch", "FineTuneView", "ReplayBuffer"]
