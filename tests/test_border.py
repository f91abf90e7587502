"""The border to C++: a tensor that a kernel would misread is a TypeError that names the argument."""

import ast
import re
import timeit
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import covr_fast
from covr_fast import _C, ReplayBuffer
from covr_fast.ops._backend import launch

MISREAD = {
    "dtype": torch.zeros(4, dtype=torch.float64),
    "device": torch.zeros(4, device="meta"),
    "strides": torch.zeros(8)[::2],
    "dimensions": torch.zeros(4, 2),
    "transposed": torch.zeros(4, 2).T,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_function_takes_each_of_its_dtypes(dtype):
    out = torch.full((2, 1), torch.nan, dtype=dtype)
    _C.discounted_returns(out, torch.ones(2, 1, dtype=dtype), torch.zeros(2, 1, dtype=torch.bool), 0.5, 1)
    torch.testing.assert_close(out, torch.tensor([[1.5], [1.0]], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_images_are_written_in_the_dtype_of_the_output(dtype):
    white = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    out = torch.zeros(1, 1, 2, 2, dtype=dtype)
    _C.window(out, white, torch.zeros(1, 2, dtype=torch.int64), 0, 1)
    assert (out == (255 if dtype == torch.uint8 else 1)).all()


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


# ---- the replay buffer ----


def batch_arguments(n: int = 2, **other: Any) -> dict[str, Any]:
    """The arguments of BatchOut for n rows, some of them replaced. Keep them while the request is used."""
    bools = torch.zeros(n, dtype=torch.bool)
    arguments = {
        "ids": torch.zeros(n, dtype=torch.int64),
        "n_step": 1,
        "reward": torch.zeros(n),
        "discount": torch.zeros(n),
        "terminated": bools,
        "truncated": bools.clone(),
        "weight": torch.zeros(n),
        "columns": [torch.zeros(n, 2)],
        "obs_offset": None,
        "next_obs_offset": None,
        "offset_range": 0,
        "shift_origin": 0,
        "translate": False,
    }
    return arguments | other


def filled_buffer() -> ReplayBuffer:
    buffer = ReplayBuffer(8, num_envs=1, obs_shape=(1, 4, 4), action_shape=(2,))
    frame = np.zeros((1, 1, 4, 4), np.uint8)
    buffer.add(frame, np.ones((1, 2)), np.ones(1), frame, np.zeros(1, bool), np.zeros(1, bool))
    return buffer


WHOLE = _C.GatherTarget(channels_last=False, shifted=False, black=False, height=4, width=4)


def test_a_request_is_filled():
    arguments, obs = batch_arguments(), torch.full((2, 1, 4, 4), torch.nan)
    request = _C.BatchOut(**arguments)
    request.add_key(WHOLE, obs, None)
    buffer = filled_buffer()
    buffer._core.sample(request, 0, 0, _C.Recency(), 1)
    assert arguments["reward"].tolist() == [1, 1]
    assert not obs.any()


@pytest.mark.parametrize(
    "place, tensor, message",
    [
        ("ids", torch.zeros(2), "ids must be a contiguous int64 tensor"),
        ("reward", torch.zeros(2, dtype=torch.float64), "reward must be a contiguous float32 tensor"),
        ("discount", torch.zeros(3), "discount must have shape [2], not [3]"),
        ("terminated", torch.zeros(2, dtype=torch.uint8), "terminated must be a contiguous bool tensor"),
        ("weight", torch.zeros(1, device="meta"), "weight must be a contiguous float32 tensor"),
        ("obs_offset", torch.zeros(1, 2, dtype=torch.int64), "obs_offset and next_obs_offset must both be"),
        ("columns", [torch.zeros(4, 2)[::2]], "columns must be a contiguous tensor"),
    ],
)
def test_a_batch_is_refused_where_the_buffer_would_write_elsewhere(place, tensor, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        _C.BatchOut(**batch_arguments(**{place: tensor}))


@pytest.mark.parametrize(
    "columns, message",
    [
        ([], "a batch must have 1 columns, not 0"),
        ([torch.zeros(2, 3)], "action must have shape [2, 2], not [2, 3]"),
        ([torch.zeros(2, 2, dtype=torch.int32)], "action must be float32 on the CPU, not int32 on the CPU"),
    ],
)
def test_columns_are_written_only_as_they_are_stored(columns, message):
    arguments, buffer = batch_arguments(columns=columns), filled_buffer()
    with pytest.raises(TypeError, match=re.escape(message)):
        buffer._core.sample(_C.BatchOut(**arguments), 0, 0, _C.Recency(), 1)


@pytest.mark.parametrize(
    "target, obs",
    [
        (WHOLE, torch.zeros(1, 1, 4, 4)),
        (WHOLE, torch.zeros(2, 1, 3, 3)),
        (WHOLE, torch.zeros(2, 1, 4, 4, dtype=torch.float64)),
        (
            _C.GatherTarget(channels_last=False, shifted=False, black=False, height=9, width=9),
            torch.zeros(2, 1, 9, 9),
        ),
    ],
)
def test_observations_are_written_only_as_their_target_says(target, obs):
    buffer, ids = filled_buffer(), torch.zeros(2, dtype=torch.int64)
    request = _C.ObservationsOut(ids)
    request.add_key(target, obs, None)
    with pytest.raises(TypeError, match="observations 'obs' has another dtype, device or shape"):
        buffer._core.observe(request, 1)


def test_a_buffer_takes_only_memory_of_its_size():
    streams, rows = torch.zeros(2, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)
    memory = {"count": streams, "first": streams, "ended": streams, "reward": torch.zeros(8)}
    memory |= {"flags": rows.to(torch.uint8), "time": rows.int()}
    core = _C.Replay(8, 2, 1, 0.9, **memory)
    for name, tensor in memory.items():
        with pytest.raises(TypeError, match=rf"{name} must have shape \[[28]\], not \[1\]"):
            _C.Replay(8, 2, 1, 0.9, **memory | {name: tensor[:1]})
    with pytest.raises(TypeError, match="values of column action"):
        core.add_column("action", torch.zeros(7, 2))
    frames = torch.zeros(2, 5, 3, 4, 4, dtype=torch.uint8)
    key = {"name": "obs", "frames": frames, "recent": frames, "stack": 1, "channels": 3, "height": 4}
    key |= {"width": 4, "channels_last": False, "written": streams, "newest": rows}
    key["depth"] = rows.to(torch.uint8)
    core.add_key(**key)
    for name, tensor in {"frames": frames[:1], "recent": frames.int(), "newest": rows[:4]}.items():
        with pytest.raises(TypeError, match=f"{name} must"):
            core.add_key(**key | {name: tensor})
    with pytest.raises(TypeError, match=re.escape("sums must have shape [1], not [8]")):
        core.prioritize(
            torch.zeros(8), rows.double(), torch.ones(1, dtype=torch.float64), rows.view(2, 4), 0.6
        )


# ---- the stub ----


def names_in(body: list[ast.stmt]) -> set[str]:
    """What these statements of a stub define, without special methods."""
    names = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {node.target.id for node in body if isinstance(node, ast.AnnAssign)}
    return {name for name in names if not name.startswith("_")}


def test_the_stub_lists_what_the_extension_has():
    body = ast.parse(Path(covr_fast.__file__).with_name("_C.pyi").read_text()).body
    listed = {(): names_in(body)}
    listed |= {(node.name,): names_in(node.body) for node in body if isinstance(node, ast.ClassDef)}
    for path, names in listed.items():
        if not _C.with_cuda:
            if path and path[0].startswith("Cuda"):
                continue
            names = {name for name in names if not re.search(r"(?<!with)_cuda$|_workspace$|^Cuda", name)}
        owner = getattr(_C, path[0]) if path else _C
        defined = vars(owner).keys() if path else dir(_C)
        assert {name for name in defined if not name.startswith("_")} == names, path
