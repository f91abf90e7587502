"""The border to C++: a tensor that a kernel would misread is a TypeError that names the argument."""

import re
import timeit

import numpy as np
import pytest
import torch

from covr_fast import _C
from covr_fast.border import address
from covr_fast.ops._backend import launch

MISREAD = {
    "dtype": torch.zeros(4, dtype=torch.float64),
    "device": torch.zeros(4, device="meta"),
    "strides": torch.zeros(8)[::2],
    "dimensions": torch.zeros(4, 2),
    "transposed": torch.zeros(4, 2).T,
}


def returns_of(dtype: torch.dtype) -> torch.Tensor:
    out = torch.full((2, 1), torch.nan, dtype=dtype)
    _C.discounted_returns(out, torch.ones(2, 1, dtype=dtype), torch.zeros(2, 1, dtype=torch.bool), 0.5, 1)
    return out


def window_as(dtype: torch.dtype) -> torch.Tensor:
    out = torch.zeros(1, 1, 2, 2, dtype=dtype)
    _C.window(
        out, torch.full((1, 1, 2, 2), 255, dtype=torch.uint8), torch.zeros(1, 2, dtype=torch.int64), 0, 1
    )
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_function_takes_each_of_its_dtypes(dtype):
    torch.testing.assert_close(returns_of(dtype), torch.tensor([[1.5], [1.0]], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_images_are_written_in_the_dtype_of_the_output(dtype):
    white = 255 if dtype == torch.uint8 else 1
    torch.testing.assert_close(window_as(dtype), torch.full((1, 1, 2, 2), white, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, torch.bool])
def test_another_dtype_is_named_with_those_that_the_function_takes(dtype):
    out, ends = torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.bool)
    expected = (
        f"rewards must be a contiguous float32 or float64 tensor with 2 dimensions on the CPU, not {dtype}"
    )
    with pytest.raises(TypeError, match=re.escape(expected)):
        _C.discounted_returns(out, torch.zeros(2, 1, dtype=dtype), ends, 0.5, 1)


def test_two_arguments_of_one_dtype_must_agree():
    rewards, ends = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.bool)
    with pytest.raises(TypeError, match="out must have the dtype of rewards"):
        _C.discounted_returns(torch.zeros(2, 1), rewards, ends, 0.5, 1)
    with pytest.raises(TypeError, match="ends must be a contiguous bool tensor"):
        _C.discounted_returns(rewards, rewards, ends.to(torch.uint8), 0.5, 1)


@pytest.mark.parametrize("tensor", MISREAD.values(), ids=MISREAD.keys())
def test_what_a_kernel_would_misread_is_refused(tensor):
    layout = "contiguous" if tensor.is_contiguous() else f"strides {tensor.stride()}"
    expected = (
        "returns must be a contiguous float32 tensor with 1 dimensions on the CPU, "
        f"not {tensor.dtype} {list(tensor.shape)} on {tensor.device}, {layout}"
    )
    with pytest.raises(TypeError, match=re.escape(expected)):
        _C.return_weights(torch.zeros(4), tensor)
    with pytest.raises(TypeError, match="out must be"):
        launch("return_weights", tensor, torch.zeros(4))


@pytest.mark.parametrize(
    "value, name", [(np.zeros(4, np.float32), "ndarray"), (None, "NoneType"), (4096, "int")]
)
def test_what_is_no_tensor_is_refused(value, name):
    with pytest.raises(TypeError, match=rf"returns must be a contiguous float32 tensor .*, not {name}"):
        _C.return_weights(torch.zeros(4), value)


def test_shapes_that_disagree_are_refused():
    with pytest.raises(TypeError, match=re.escape("out must have shape [4], not [5]")):
        _C.return_weights(torch.zeros(5), torch.zeros(4))
    frames, offsets = torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match=re.escape("offsets must have shape [2, 2], not [1, 2]")):
        _C.window(torch.zeros(2, 1, 3, 3), frames, offsets[:1], 0, 1)
    with pytest.raises(TypeError, match=re.escape("sums must have shape [3], not [1]")):
        _C.sum_tree_update(torch.zeros(40), torch.zeros(1, dtype=torch.float64), offsets[0], torch.zeros(2))


def test_no_kernel_reads_more_indices_than_it_may_write():
    with pytest.raises(TypeError, match=re.escape("indices must have shape [2], not [1]")):
        _C.indices_above(torch.tensor([1.0, 2, 3]), 1.5, torch.zeros(1, dtype=torch.int64), 1)


def test_tensors_without_elements_have_no_address_and_are_taken():
    _C.return_weights(torch.empty(0), torch.empty(0))
    empty = torch.empty(0, 3)
    _C.discounted_returns(empty, empty, empty.bool(), 0.5, 1)


def test_parameters_and_tensors_with_a_gradient_are_read():
    out = torch.zeros(3)
    for returns in (
        torch.tensor([1.0, 3, 2], requires_grad=True),
        torch.nn.Parameter(torch.tensor([1.0, 3, 2])),
    ):
        _C.return_weights(out.zero_(), returns)
        torch.testing.assert_close(out, torch.tensor([0.0, 1, 0]))


def test_arguments_have_names():
    out = torch.zeros(2)
    _C.return_weights(returns=torch.tensor([1.0, 2]), out=out)
    assert out.tolist() == [0, 1]


def test_a_tensor_is_read_in_a_few_microseconds():
    out, returns = torch.zeros(1), torch.zeros(1)
    best = min(timeit.repeat(lambda: _C.return_weights(out, returns), number=1000, repeat=5)) / 1000
    assert best < 20e-6, f"{best * 1e6:.1f} us for two tensors"


@pytest.mark.parametrize("tensor", MISREAD.values(), ids=MISREAD.keys())
def test_no_address_is_given_of_what_a_kernel_would_misread(tensor):
    if tensor.is_cpu and tensor.dtype == torch.float32 and tensor.is_contiguous():
        pytest.skip("an address has no dimensions")
    with pytest.raises(TypeError, match=r"contiguous torch\.float32 tensor on cpu, but was given torch"):
        address(tensor, torch.float32)
