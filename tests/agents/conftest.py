"""What tests of compiled agents begin with."""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters


@pytest.fixture
def nothing_compiled_yet():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced_only(monkeypatch, nothing_compiled_yet):
    """torch traces and differentiates as ever, but runs its operators instead of compiling them: seconds."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
