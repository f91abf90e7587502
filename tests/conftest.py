"""Shared test set-up: the `needs_cuda` marker, and one torch thread where speed does not matter."""

import os

import pytest
import torch

_CUDA_REQUIRED = os.environ.get("COVR_REQUIRE_CUDA") == "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips `needs_cuda` tests without a device, unless one was promised: then they fail."""
    if item.get_closest_marker("needs_cuda") and not torch.cuda.is_available():
        if _CUDA_REQUIRED:
            pytest.fail("COVR_REQUIRE_CUDA=1, but torch sees no CUDA device", pytrace=False)
        pytest.skip("needs a CUDA device")
