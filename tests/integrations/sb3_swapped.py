"""A pytest plugin that puts FastReplayBuffer in the place of Stable-Baselines3's replay buffers.

The names in SB3's module are swapped while the tests are imported and given back before they run: SB3's own
classes, from which the hindsight buffer derives, refer to each other by them.
"""

from typing import Any

import pytest
from stable_baselines3.common import buffers, off_policy_algorithm

from covr_fast.integrations.sb3 import FastReplayBuffer


class ReplayBuffer(FastReplayBuffer):
    pass


class DictReplayBuffer(FastReplayBuffer):
    pass


class NStepReplayBuffer(FastReplayBuffer):
    """With the default that SB3's class of this name has."""

    def __init__(self, *args: Any, n_steps: int = 3, **kwargs: Any) -> None:
        super().__init__(*args, n_steps=n_steps, **kwargs)


_SWAPPED = {kind.__name__: kind for kind in (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer)}
_OWN = {name: getattr(buffers, name) for name in _SWAPPED}


def _set(module: Any, classes: dict[str, type]) -> None:
    for name, kind in classes.items():
        setattr(module, name, kind)


def pytest_configure() -> None:
    _set(buffers, _SWAPPED)
    _set(off_policy_algorithm, _SWAPPED)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    _set(buffers, _OWN)
