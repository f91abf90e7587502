"""Every kernel does some work of training: none is reached by its tests and benchmarks alone.

A kernel file belongs to functions that launch its kernels. Small training runs count their calls, once on the
CPU, where the same operations take the C++, and once with what a GPU runs (also without one, under
tests/cuda_on_cpu).
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import small_config

import covr_fast
from covr_fast import _C, Trainer

KERNELS: dict[str, dict[str, str]] = {
    "cuda/filter.cu": {"exploration_filter_cuda": "exploration_threshold"},
    "cuda/frames.cu": {"window_cuda": "window"},
    "cuda/gather.cu": {"Replay.gather_cuda": "Replay.sample"},
    "cuda/pixels.cu": {"window_cuda": "window", "Replay.gather_cuda": "Replay.sample"},
    "cuda/returns.cu": {
        "discounted_returns_cuda": "discounted_returns",
        "horizon_returns_cuda": "horizon_returns",
    },
    "cuda/sum_tree.cu": {
        "sum_tree_update_cuda": "sum_tree_update",
        "sum_tree_sample_cuda": "sum_tree_sample",
    },
    "cuda/weights.cu": {"return_weights_cuda": "return_weights"},
    "triton/loss.py": {
        "loss.reduce_rows": "cross_entropy_reduce",
        "loss.write_gradient": "cross_entropy_gradient",
    },
}
"""For each kernel file: the functions that launch its kernels, and those that do the same on a CPU. A name
without an owner is of the extension."""

NO_KERNEL = {"Replay.plan_cuda", "Replay.upload_cuda"}
"""Functions for a GPU that work on the CPU or only copy."""

UNREACHED = {"cuda/sum_tree.cu"}
"""Kernels whose part of the loop has not come to the GPU yet."""

RUNS: dict[str, dict[str, Any]] = {
    "whole episodes": {"covr__horizon": None},
    "a horizon, and priorities": {"covr__horizon": 7, "replay__sampler": "prioritized"},
}
"""The training configurations, as changes of `small_config`."""

ON_CPU = "COVR_CUDA_ON_CPU" in os.environ
EXTENSION = Path(covr_fast.__file__).parent
FILES = [
    pytest.param(file, marks=pytest.mark.xfail(strict=True) if file in UNREACHED else ()) for file in KERNELS
]


def test_the_list_has_every_kernel():
    root = Path(__file__).parent.parent / "kernels"
    sources = {
        path.relative_to(root).as_posix() for path in (*root.glob("cuda/*.cu"), *root.glob("triton/*.py"))
    }
    assert KERNELS.keys() == sources - {"triton/__init__.py"}


def test_the_list_has_every_function_that_launches_one():
    stub = (EXTENSION / "_C.pyi").read_text()
    functions = set(re.findall(r"^def (\w+_cuda)\(", stub, re.MULTILINE))
    functions |= {f"Replay.{name}" for name in re.findall(r"^    def (\w+_cuda)\(", stub, re.MULTILINE)}
    assert launching("cuda/") == functions - NO_KERNEL


def launching(folder: str) -> set[str]:
    """The functions that launch kernels of this folder."""
    return {name for file in KERNELS if file.startswith(folder) for name in KERNELS[file]}


def owner_of(name: str) -> Any:
    owner, _, _ = name.rpartition(".")
    if owner == "loss":
        return import_module("covr_fast.kernels.triton.loss")
    return getattr(_C, owner) if owner else _C


def counting(count: Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*arguments: Any, **keywords: Any) -> Any:
        count[name] += 1
        return function(*arguments, **keywords)

    return counted


def calls(folder: Path, names: set[str], **where: Any) -> Counter[str]:
    """How often small runs call these functions."""
    count: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            owner, leaf = owner_of(name), name.rpartition(".")[2]
            patch.setattr(owner, leaf, counting(count, name, getattr(owner, leaf)))
        for number, changes in enumerate(RUNS.values()):
            config = small_config(steps=96, **changes, **where)
            summary = Trainer(config, folder / str(number)).run()
            assert summary["rounds"][0]["nonzero_share"] > 0  # a round has trained the VLM
    return count


@pytest.fixture(scope="module")
def cpu_calls(tmp_path_factory) -> Counter[str]:
    names = {name for functions in KERNELS.values() for name in functions.values()}
    return calls(tmp_path_factory.mktemp("cpu"), names)


@pytest.fixture(scope="module")
def gpu_calls(tmp_path_factory) -> Iterator[Counter[str]]:
    """Under tests/cuda_on_cpu the networks stay on the CPU: only the buffer moves, and what is made of it."""
    folder, names = tmp_path_factory.mktemp("gpu"), launching("cuda/" if ON_CPU else "")
    with pytest.MonkeyPatch.context() as patch:
        if ON_CPU:  # bitsandbytes, which peft imports, takes it for a GPU
            patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
        yield calls(folder, names, device="cpu" if ON_CPU else "cuda", replay__device="cuda")


@pytest.mark.parametrize("file", FILES)
def test_training_reaches_the_operation_of_every_kernel(file, cpu_calls):
    assert all(cpu_calls[name] for name in KERNELS[file].values()), cpu_calls


@pytest.mark.needs_cuda
@pytest.mark.parametrize("file", FILES)
def test_training_reaches_every_kernel_on_a_gpu(file, gpu_calls):
    if ON_CPU and file.startswith("triton/"):
        pytest.skip("Triton needs a GPU, or its interpreter, which training never picks")
    assert all(gpu_calls[name] for name in KERNELS[file]), gpu_calls
