"""Shared test set-up: the `needs_cuda` marker, and one thread where speed does not matter."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

if _EXTENSION := os.environ.get("COVR_CUDA_ON_CPU"):
    from cuda_on_cpu import device

    device.install(Path(_EXTENSION))

_CUDA_REQUIRED = os.environ.get("COVR_REQUIRE_CUDA") == "1"
_THREADS = int(os.environ.get("COVR_TEST_THREADS", "1"))  # more of them for a sanitizer that looks for races


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips `needs_cuda` tests without a device, unless one was promised: then they fail."""
    if item.get_closest_marker("needs_cuda") and not torch.cuda.is_available():
        if _CUDA_REQUIRED:
            pytest.fail("COVR_REQUIRE_CUDA=1, but torch sees no CUDA device", pytrace=False)
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _few_threads():
    """Small tensors gain nothing from more threads, and tests that share a machine lose a lot by them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(_THREADS)
    yield
    torch.set_num_threads(threads)
