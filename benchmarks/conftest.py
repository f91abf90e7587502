"""As in the tests, `needs_cuda` skips without a device, and fails where COVR_REQUIRE_CUDA=1 promises one."""

import os

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_cuda") and not torch.cuda.is_available():
        if os.environ.get("COVR_REQUIRE_CUDA") == "1":
            pytest.fail("COVR_REQUIRE_CUDA=1, but torch sees no CUDA device", pytrace=False)
        pytest.skip("needs a CUDA device")
