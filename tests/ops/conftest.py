"""What every operation's tests share: the kernels of this machine and adversarial inputs."""

import os

import pytest
import torch
from hypothesis import settings

from covr_fast import _C

# Kernels compile and threads start on the first call, and CI machines are shared: no deadline per example.
settings.register_profile("ops", deadline=None, max_examples=int(os.environ.get("COVR_EXAMPLES", "60")))
settings.load_profile("ops")


@pytest.fixture(scope="session", params=["reference", "cpp"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A CUDA device does not help a build without CUDA kernels: say so instead of failing in the call."""
    if item.get_closest_marker("needs_cuda") and torch.cuda.is_available() and not _C.with_cuda:
        pytest.fail("torch sees a CUDA device, but this build has no CUDA kernels", pytrace=False)
