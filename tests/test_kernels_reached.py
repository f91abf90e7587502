"""Every kernel does some work of training, or the documentation says whose work it does.

Small training runs count the calls of functions that launch kernels: once on the CPU, where the same
operations take the C++, and once with what a GPU runs. Under tests/cuda_on_cpu, which has no GPU, the
launches themselves are compared with the table of kernels in docs/kernels.md.
"""

import ctypes
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import small_config

import covr_fast
from covr_fast import _C, ReplayBuffer, Trainer

ROOT = Path(__file__).parent.parent
CALLED: dict[str, dict[str, str]] = {
    "cuda/add.cu": {"CudaAdd.apply": "Replay.add"},
    "cuda/filter.cu": {"exploration_filter_cuda": "exploration_threshold"},
    "cuda/pixels.cu": {"window_cuda": "window", "CudaMirror.observe": "Replay.observe"},
    "cuda/priorities.cu": {"CudaMirror.set_priorities": "Replay.set_priorities"},
    "cuda/returns.cu": {
        "discounted_returns_cuda": "discounted_returns",
        "horizon_returns_cuda": "horizon_returns",
    },
    "cuda/sample.cu": {"CudaMirror.sample": "Replay.sample_prioritized", "CudaMirror.get": "Replay.get"},
    "cuda/sum_tree.cu": {"CudaMirror.set_priorities": "Replay.set_priorities"},
    "cuda/weights.cu": {"return_weights_cuda": "return_weights"},
    "triton/loss.py": {
        "loss.reduce_rows": "cross_entropy_reduce",
        "loss.write_gradient": "cross_entropy_gradient",
    },
}
"""For each file whose kernels training launches: the functions that do, and those that do the same on a CPU.
A name without an owner is of the extension."""

OTHERS = {
    "CudaAdd.add",  # rows of device memory
    "CudaAdd.describe",  # only copies
    "CudaMirror.follow",  # what `cut` and corrections change; an addition launches the same
    "sum_tree_sample_cuda",  # SumTree.sample: the buffer's sampler draws in sample.cu
    "sum_tree_update_cuda",  # SumTree.update: the buffer's comes by CudaMirror.set_priorities
}
"""Functions that get a stream and are not counted."""

RUNS: dict[str, dict[str, Any]] = {
    "whole episodes, and values after them": {"covr__horizon": None, "covr__bootstrap": True},
    "a horizon, and priorities": {"covr__horizon": 7, "replay__sampler": "prioritized"},
}
"""The training configurations, as changes of `small_config`."""

ON_CPU = "COVR_CUDA_ON_CPU" in os.environ
BY_POINTER = {"pixel_kernel": "kernel"}
"""Kernels that are launched through a variable of this name."""


# ---- the lists are complete ----


_CUDA = r"__global__ void(?:\s+__launch_bounds__\([^)]*\))?\s+(\w+)\("
_TRITON = r"@triton\.jit\ndef _(\w+)\("


def kernels() -> dict[str, str]:
    """The file of each kernel, under kernels/."""
    found = {}
    for pattern, files in (_CUDA, "cuda/*.cu"), (_TRITON, "triton/*.py"):
        for path in (ROOT / "kernels").glob(files):
            names = re.findall(pattern, path.read_text())
            found |= dict.fromkeys(names, f"{path.parent.name}/{path.name}")
    return found


def documented() -> dict[str, tuple[str, str]]:
    """For each kernel in the table of docs/kernels.md: its file, and the run that launches it."""
    text = (ROOT / "docs/kernels.md").read_text()
    rows = re.findall(r"^\| `(\w+/[\w.]+) (\w+)` \|.*\| ([^|]*) \|$", text, re.MULTILINE)
    return {kernel: (file, run) for file, kernel, run in rows}


def test_the_documentation_says_of_every_kernel_who_calls_it():
    assert {kernel: file for kernel, (file, _) in documented().items()} == kernels()
    assert {run for _, run in documented().values()} == {"training", "vectors", "device rows", "-"}


def test_training_calls_every_file_with_kernels_for_pixels():
    training = {file for file, run in documented().values() if run == "training"}
    assert CALLED.keys() == training
    assert set(kernels().values()) - training == {"cuda/gather.cu"}


def test_the_list_has_every_function_that_launches_one():
    functions, owner = set(), ""
    stub = (Path(covr_fast.__file__).parent / "_C.pyi").read_text()
    pattern = r"^class (\w+)|^ *def (\w+)\(([^)]*\bstream: int\b)?"
    for name, function, with_stream in re.findall(pattern, stub, re.MULTILINE):
        if name:
            owner = f"{name}."
        elif with_stream:
            functions.add(f"{owner}{function}" if not function.endswith("_cuda") else function)
    assert launching("cuda/") == functions - OTHERS


def launching(folder: str) -> set[str]:
    """The functions that launch kernels of this folder."""
    return {name for file in CALLED if file.startswith(folder) for name in CALLED[file]}


# ---- what training calls ----


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
    names = {name for functions in CALLED.values() for name in functions.values()}
    return calls(tmp_path_factory.mktemp("cpu"), names)


@pytest.fixture(scope="module")
def gpu_calls(tmp_path_factory) -> Counter[str]:
    """Of functions, and under tests/cuda_on_cpu of launches by kernel. There the networks stay on the CPU:
    only the buffer moves, and what is made of it."""
    folder, names = tmp_path_factory.mktemp("gpu"), launching("cuda/" if ON_CPU else "")
    before = launches()
    count = calls(folder, names, device="cpu" if ON_CPU else "cuda", replay__device="cuda")
    return count + launches() - before


@pytest.mark.parametrize("file", CALLED)
def test_training_reaches_the_operation_of_every_kernel(file, cpu_calls):
    assert all(cpu_calls[name] for name in CALLED[file].values()), cpu_calls


@pytest.mark.needs_cuda
@pytest.mark.parametrize("file", CALLED)
def test_training_reaches_every_kernel_on_a_gpu(file, gpu_calls):
    if ON_CPU and file.startswith("triton/"):
        pytest.skip("Triton needs a GPU, or its interpreter, which training never picks")
    assert all(gpu_calls[name] for name in CALLED[file]), gpu_calls


# ---- what is launched: only tests/cuda_on_cpu can say ----

needs_launches = pytest.mark.skipif(not ON_CPU, reason="counts launches: needs tests/cuda_on_cpu/build.sh")


def launches() -> Counter[str]:
    """How often each kernel was launched so far."""
    if not ON_CPU:
        return Counter()
    number_of = ctypes.CDLL(_C.__file__).emulator_launches
    number_of.restype = ctypes.c_int64
    cuda = (kernel for kernel, file in kernels().items() if file.startswith("cuda/"))
    return Counter({kernel: number_of(BY_POINTER.get(kernel, kernel).encode()) for kernel in cuda})


def launched_by(run: str) -> set[str]:
    """According to the documentation."""
    return {kernel for kernel, (file, of) in documented().items() if of == run and file.startswith("cuda/")}


@needs_launches
@pytest.mark.needs_cuda
def test_training_launches_what_the_documentation_says(gpu_calls):
    assert {kernel for kernel in kernels() if gpu_calls[kernel]} == launched_by("training")


@needs_launches
@pytest.mark.needs_cuda
def test_device_rows_launch_what_the_documentation_says(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    simulator = import_module("gpu_simulator").Reach(4, torch.device("cuda"))
    monkeypatch.delitem(sys.modules, "gpu_simulator")
    shape = tuple(simulator.stack.shape[1:])
    buffer = ReplayBuffer(80, num_envs=4, obs_shape=shape, action_shape=(2,), frame_stack=3, device="cuda")
    before, obs = launches(), simulator.stack
    for _ in range(3):
        action = torch.zeros(4, 2, device="cuda")
        next_obs, reward, terminated, truncated = simulator.step(action)
        buffer.add(obs, action, reward, next_obs, terminated, truncated)
        obs = simulator.restart(terminated | truncated)
    assert len(buffer) == 12
    now = set(launches() - before)  # without those that there were none of
    assert now == launched_by("device rows") | {"apply_kernel"}


@needs_launches
@pytest.mark.needs_cuda
def test_vectors_launch_what_the_documentation_says():
    buffer = ReplayBuffer(9, num_envs=1, obs_shape=(3,), action_shape=(), device="cuda")
    buffer.add([[1.0, 2, 3]], [0.0], [1.0], [[4.0, 5, 6]], [True], [False])
    before = launches()
    assert buffer.sample(2).next_obs.cpu().tolist() == [[4, 5, 6]] * 2
    now = set(launches() - before)  # without those that there were none of
    assert now == launched_by("vectors") | {"draw_kernel", "rows_kernel"}
