"""Which GPUs a build's kernels run on, and what says so where they do not. The GPUs are made up."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from covr_fast import _C, architectures
from covr_fast.architectures import kernel_obstacle, runs_on, warn_once
from covr_fast.buffer.gpu import checked_device
from covr_fast.errors import UserError
from covr_fast.ops import _backend
from covr_fast.parts import replay_device

RELEASED = "80-real,90-real,100-real,120"


@pytest.mark.parametrize(
    "built, capability, runs",
    [
        (RELEASED, (7, 5), False),  # T4
        (RELEASED, (8, 0), True),
        (RELEASED, (8, 9), True),  # machine code runs on later GPUs of its generation
        (RELEASED, (9, 0), True),
        (RELEASED, (10, 3), True),
        (RELEASED, (11, 0), False),
        (RELEASED, (12, 1), True),
        (RELEASED, (13, 0), True),  # PTX runs on all later ones
        ("80-real,90", (10, 0), True),
        ("90-real", (8, 0), False),
        ("90-real", (10, 0), False),
        ("86-real", (8, 0), False),
        ("86-real", (8, 9), True),
        ("90-virtual", (8, 9), False),
        ("90-virtual", (12, 0), True),
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("100f", (10, 3), True),
        ("100f", (12, 0), False),
        ("", (9, 0), False),
    ],
)
def test_which_gpu_runs_what(built, capability, runs):
    assert runs_on(built, capability) is runs


def test_what_cannot_be_read_is_named():
    with pytest.raises(ValueError, match="'native' is not written as 90, 90-real or 90-virtual"):
        runs_on("80-real,native", (9, 0))


def test_the_build_says_what_it_is_for():
    assert bool(_C.cuda_architectures) == _C.with_cuda
    runs_on(_C.cuda_architectures, (9, 0))  # can be read


@pytest.fixture
def t4(monkeypatch):
    """A machine whose only GPU is older than what this build, with CUDA kernels, was made for."""
    monkeypatch.setattr(_C, "with_cuda", True)
    monkeypatch.setattr(_C, "cuda_architectures", RELEASED)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(architectures, "_warned", set())
    architectures._obstacle_at.cache_clear()
    yield torch.device("cuda", 0)
    architectures._obstacle_at.cache_clear()


REASON = f"are for architectures {RELEASED}, and Tesla T4 is 75 .rebuild with COVR_CUDA_ARCHITECTURES=75.$"


def select(backend: str, tensor: torch.Tensor) -> str:
    return _backend.select("op", backend, tensor, ("cpp", "cuda"), (torch.float32,))


def test_auto_runs_the_reference_and_says_why_once(t4):
    with FakeTensorMode():
        returns = torch.empty(3, device=t4)
    with pytest.warns(RuntimeWarning, match="'auto' runs the reference on cuda:0: .* " + REASON):
        assert select("auto", returns) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select("auto", returns) == "reference"
    with pytest.raises(RuntimeError, match="op: backend 'cuda' cannot run: .* " + REASON):
        select("cuda", returns)


def test_auto_runs_the_kernel_on_a_gpu_that_fits(t4, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with FakeTensorMode():
        returns = torch.empty(3, device=t4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select("auto", returns) == select("cuda", returns) == "cuda"


def test_buffers_are_not_made_where_no_kernel_runs(t4, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(RuntimeError, match=r"^device cuda:0: .* is 75 .*=75.*, or use device='cpu'"):
        checked_device(torch.device("cuda"), "device")
    with pytest.warns(RuntimeWarning, match="frames stay in host memory.* " + REASON):
        assert replay_device("auto", t4) == torch.device("cpu")
    with pytest.raises(UserError, match=r"^replay\.device='cuda', but .* is 75 "):
        replay_device("cuda", t4)


def test_graphs_take_the_answer_as_a_constant(t4):
    def step(x: torch.Tensor) -> torch.Tensor:
        if (obstacle := kernel_obstacle(t4)) is not None:
            warn_once(obstacle)
            return x + 1
        return x

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    with pytest.warns(RuntimeWarning, match=REASON):
        assert compiled(torch.zeros(1)).item() == 1
