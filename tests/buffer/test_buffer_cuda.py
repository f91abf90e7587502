"""The GPU's batches equal the CPU's, bit for bit."""

import pytest
import torch
from test_buffer import Driver, make

from covr_fast import _C
from covr_fast.buffer.gpu import checked_device


@pytest.mark.needs_cuda
@pytest.mark.parametrize("storage", ["device", "pinned"])
@pytest.mark.parametrize("augment", [None, "shift", "crop", "translate"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.float16])
def test_batches_equal(storage, augment, dtype, tmp_path):
    on_cpu = make(frame=(3, 13, 11), n_step=2)
    on_gpu = make(frame=(3, 13, 11), n_step=2, device="cuda", storage=storage)
    for _ in range(120):
        assert torch.equal(on_cpu.add(), on_gpu.add())
        if len(on_cpu.buffer) < 20:
            continue
        a = on_cpu.buffer.sample(16, augment=augment, pad=2, dtype=dtype)
        b = on_gpu.buffer.sample(16, augment=augment, pad=2, dtype=dtype)
        for name in ("obs", "next_obs", "action", "reward", "discount", "index"):
            assert torch.equal(getattr(a, name), getattr(b, name).cpu()), name
    on_gpu.buffer.save(tmp_path / "b")
    again = type(on_gpu.buffer).load(tmp_path / "b", device="cuda", storage=storage)
    index = on_gpu.buffer.sample(32).index
    assert torch.equal(on_gpu.buffer.frames(index), again.frames(index))
    assert torch.equal(on_cpu.buffer.observations(index), again.observations(index).cpu())
    restored = Driver(again, on_gpu.envs)
    restored.oracle, restored.rng = on_gpu.oracle, on_gpu.rng
    restored.add()  # continues its streams: the latest frames were restored on the CPU too


def test_errors_say_why():
    with pytest.raises(ValueError, match="pinned storage is for device='cuda'"):
        checked_device(torch.device("cpu"), "pinned")
    if not _C.with_cuda:
        with pytest.raises(RuntimeError, match="no CUDA kernels"):
            make(device="cuda")
    elif not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no CUDA device"):
            make(device="cuda")


@pytest.mark.needs_cuda
@pytest.mark.parametrize("frame", [(3, 13, 11), (1, 16, 12), (2, 12, 16)])
@pytest.mark.parametrize("augment", [None, "shift", "crop", "translate"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_batches_in_either_layout_are_equal(frame, augment, dtype):
    on_cpu, on_gpu = (make(frame=frame, steps=40, device=device) for device in ("cpu", "cuda"))
    for layout in (torch.contiguous_format, torch.channels_last):
        options = {"augment": augment, "pad": 2, "dtype": dtype, "memory_format": layout}
        a, b = on_cpu.buffer.sample(9, **options), on_gpu.buffer.sample(9, **options)
        assert b.obs.is_contiguous(memory_format=layout)
        assert torch.equal(a.obs, b.obs.cpu())
        assert torch.equal(a.next_obs, b.next_obs.cpu())
