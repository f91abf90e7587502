"""Pinned memory of the exact size."""

import mmap
import os
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from covr_fast import _C
from covr_fast.buffer.pinned import pinned_empty

GPU = torch.device("cuda")


def mapped_bytes() -> int:
    """Of this process's address space."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * mmap.PAGESIZE


@pytest.mark.needs_cuda
def test_it_takes_no_more_than_its_size_and_gives_it_back():
    pinned_empty((1,), torch.uint8, GPU)  # the context
    nbytes = (64 << 20) + 4096  # torch would take 128 MiB
    before = mapped_bytes()
    tensor = pinned_empty((nbytes // 4,), torch.float32, GPU)
    assert nbytes <= mapped_bytes() - before < nbytes + (16 << 20)
    part = tensor[5:9]
    del tensor
    part.fill_(3)  # still there
    assert part.cuda().tolist() == [3] * 4
    del part
    assert mapped_bytes() - before < 16 << 20


@pytest.mark.needs_cuda
@pytest.mark.skipif("COVR_CUDA_ON_CPU" in os.environ, reason="torch asks the driver")
def test_torch_sees_that_it_is_pinned():
    assert pinned_empty((1000,), torch.uint8, GPU).is_pinned()


def test_shape_and_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(_C, "pinned_array_cuda", lambda nbytes: np.zeros(nbytes, np.uint8), raising=False)
    tensor = pinned_empty((3, 5), torch.float16, GPU)
    assert tensor.shape == (3, 5)
    assert tensor.dtype == torch.float16
    assert tensor.untyped_storage().nbytes() == 30
    assert pinned_empty((0, 5), torch.float16, GPU).shape == (0, 5)


def test_torch_allocates_where_the_driver_cannot_pin(monkeypatch):
    def refuse(nbytes):
        raise RuntimeError("cudaHostRegister: operation not supported")

    asked = []

    def empty(shape, **options):
        asked.append((shape, options))
        return torch.zeros(shape, dtype=options["dtype"])

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(_C, "pinned_array_cuda", refuse, raising=False)
    monkeypatch.setattr(torch, "empty", empty)
    with pytest.warns(UserWarning, match="operation not supported.*up to twice the size"):
        pinned_empty((3, 5), torch.float16, GPU)
    assert asked == [((3, 5), {"dtype": torch.float16, "device": "cpu", "pin_memory": True})]


@pytest.mark.skipif(not _C.with_cuda or torch.cuda.is_available(), reason="needs CUDA kernels, but no GPU")
def test_without_a_gpu_the_reason_is_named():
    with pytest.raises(RuntimeError, match=r"cudaGetDevice|cudaHostRegister"):
        _C.pinned_array_cuda(4096)
