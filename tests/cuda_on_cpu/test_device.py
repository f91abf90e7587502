"""torch on the device "cuda" that is not there."""

import os
import threading

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not os.environ.get("COVR_CUDA_ON_CPU"), reason="needs tests/cuda_on_cpu/build.sh"
)


def test_tensors_say_where_they_are():
    x = torch.arange(6.0, device="cuda").reshape(2, 3)
    assert x.device == torch.device("cuda", 0)
    assert x.is_cuda
    view = x.T[1:]
    view += 1
    assert x.tolist() == [[0, 2, 3], [3, 5, 6]]
    assert torch.equal(view.cpu(), torch.tensor([[2.0, 5.0], [3.0, 6.0]]))
    assert torch.tensor([1, 2], device="cuda").to("cpu").is_cpu
    assert repr(x) == f"{x.cpu()!r} on cuda:0"


def test_generators_repeat_their_draws():
    draws = [torch.rand(4, device="cuda", generator=torch.Generator("cuda").manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)


def test_other_threads_have_the_device_too():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.zeros(2, device="cuda").device.type))
    thread.start()
    thread.join()
    assert found == ["cuda"]


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: x.cpu(), torch.Tensor.nonzero])
def test_waiting_is_an_error_where_torch_is_told_so(wait):
    x = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        (x + 1).to("cpu", non_blocking=True)
        with pytest.raises(RuntimeError, match="synchronizing"):
            wait(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
