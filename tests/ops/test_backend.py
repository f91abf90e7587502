"""Choosing a backend: automatic, by name, and the errors that say why one cannot run."""

import pytest
import torch

from covr_fast import _C, ops

REWARDS = torch.ones(3, 2)
ENDS = torch.zeros(3, 2, dtype=torch.bool)


def test_auto_takes_the_kernel_and_reference_agrees():
    expected = ops.discounted_returns(REWARDS, ENDS, 0.5, backend="reference")
    torch.testing.assert_close(ops.discounted_returns(REWARDS, ENDS, 0.5), expected)
    torch.testing.assert_close(ops.discounted_returns(REWARDS, ENDS, 0.5, backend="cpp"), expected)


@pytest.mark.parametrize(
    "backend, error, reason",
    [
        ("gpu", ValueError, "auto, reference, cpp, cuda, triton, not 'gpu'"),
        ("triton", ValueError, "there is no triton backend"),
        ("cuda", RuntimeError, "runs on CUDA tensors" if _C.with_cuda else "no CUDA kernels"),
    ],
)
def test_a_backend_that_cannot_run_says_why(backend, error, reason):
    with pytest.raises(error, match=reason):
        ops.discounted_returns(REWARDS, ENDS, 0.5, backend=backend)


def test_dtype_the_kernel_does_not_take():
    returns = torch.rand(5, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"float32, not torch\.float64; use 'reference'"):
        ops.exploration_filter(returns, 0.0, backend="cpp")
    assert ops.exploration_filter(returns, 0.0).indices.dtype == torch.int64  # auto: the reference


def test_devices_must_agree():
    with pytest.raises(ValueError, match="ends is on meta but rewards is on cpu"):
        ops.discounted_returns(REWARDS, ENDS.to("meta"), 0.5)
