"""The benchmarks follow the tests' rule for `needs_cuda`: skipped without a device unless one is promised."""

import os

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_cuda") and not torch.cuda.is_available():
        if os.environ.get("COVR_REQUIRE_CUDA") == "1":
            pytest.fail("COVR_REQUIRE_CUDA=1, but torch sees no CUDA device", pytrace=False)
        pytest.skip("needs a CUDA device")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Results are committed: the processor matters, the host's name does not."""
    for field in ("node", "release"):
        machine_info.pop(field, None)
