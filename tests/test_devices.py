"""GPUs by number: which one a run is on, and that every launch goes to the one its tensors are on."""

from contextlib import contextmanager

import pytest
import torch
from small_runs import small_config

from covr_fast import _C, parts
from covr_fast.buffer.arguments import device_priorities
from covr_fast.cuda_graph import CudaGraphs
from covr_fast.errors import UserError
from covr_fast.ops import _backend, _logit_rows
from covr_fast.parts import compute_device, replay_device
from covr_fast.streams import current_on

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture
def two_gpus(monkeypatch) -> list[torch.device]:
    """torch sees two GPUs. Returns a list whose last entry is the current one."""
    current = [FIRST]

    @contextmanager
    def enter(device):
        current.append(torch.device(device))
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1].index)
    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(parts, "kernel_obstacle", lambda device: None)
    return current


class OnGpu(torch.Tensor):
    """A tensor on the host that says that it is on a GPU, for what only asks where tensors are."""

    number: int
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    device = property(lambda self: torch.device("cuda", self.number))

    def get_device(self) -> int:
        return self.number


def on_gpu(number: int, *shape: int) -> torch.Tensor:
    tensor = torch.zeros(*shape).as_subclass(OnGpu)
    tensor.number = number
    return tensor


@pytest.mark.parametrize("name, expected", [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_run_is_on_the_gpu_that_is_named(two_gpus, name, expected):
    assert compute_device(name) == torch.device("cuda", expected)
    assert replay_device(name, CPU) == (CPU if name == "auto" else torch.device("cuda", expected))


def test_frames_are_where_the_agent_computes(two_gpus):
    assert replay_device("auto", SECOND) == SECOND
    assert replay_device("cuda", SECOND) == SECOND
    assert replay_device("cuda:0", SECOND) == FIRST
    assert replay_device("cpu", SECOND) == CPU


def test_a_gpu_that_is_not_there_is_named(two_gpus):
    with pytest.raises(UserError, match="device='cuda:2' but torch sees cuda:0 to cuda:1 only"):
        compute_device("cuda:2")
    with pytest.raises(UserError, match=r"replay.device='cuda:7' but torch sees cuda:0 to cuda:1 only"):
        replay_device("cuda:7", FIRST)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "1", ""])
def test_what_is_no_device_is_named(name):
    for option, setting in ("device", "device"), ("replay.device", "replay__device"):
        with pytest.raises(UserError, match=f"^{option}={name!r} must be auto, cpu, cuda or a GPU by number"):
            small_config(**{setting: name}).check()


def test_settings_may_name_a_gpu():
    config = small_config(device="cuda:1", replay__device="cuda:0")
    config.check()
    assert type(config).from_dict(config.to_dict()) == config


def test_kernels_are_launched_on_the_gpu_of_their_tensors(two_gpus, monkeypatch):
    launched = []
    monkeypatch.setattr(_backend, "stream", lambda tensor: tensor.number + 100)
    monkeypatch.setattr(_C, "a_kernel_cuda", lambda *_: launched.append((two_gpus[-1], _[-1])), raising=False)
    _backend.launch("a_kernel", on_gpu(1, 3), on_gpu(1, 3))
    assert launched == [(SECOND, 101)]
    assert two_gpus == [FIRST]
    with pytest.raises(TypeError, match="one tensor is on cuda:1, another one on cuda:0"):
        _backend.launch("a_kernel", on_gpu(1, 3), on_gpu(0, 3))


def test_triton_launches_on_the_gpu_of_the_logits(two_gpus, monkeypatch):
    kernels = pytest.importorskip("covr_fast.kernels.triton.loss")
    launched = []
    for name in "reduce_rows", "write_gradient":
        monkeypatch.setattr(kernels, name, lambda *_, name=name: launched.append((name, two_gpus[-1])))
    logits = on_gpu(1, 2, 5)
    _logit_rows.reduce_rows(logits, logits, logits, 0.0, "triton")
    _logit_rows.write_gradient(logits, logits, logits, logits, 0.0, logits, logits, "triton")
    assert launched == [("reduce_rows", SECOND), ("write_gradient", SECOND)]


def test_a_graph_is_recorded_on_its_gpu(two_gpus, monkeypatch):
    """torch waits for the current device before it records."""
    recorded = []

    @contextmanager
    def record(graph, **_):
        recorded.append(two_gpus[-1])
        yield

    monkeypatch.setattr(torch.cuda, "Event", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("Graph", (), {}))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(CudaGraphs, "_side", None)
    CudaGraphs(SECOND).capture(dict)
    assert recorded == [SECOND]


def test_on_a_cpu_no_device_becomes_current(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", None)
    with current_on(CPU):
        pass


def test_tensors_of_one_call_on_two_gpus_are_refused():
    ids, floats, bools = torch.zeros(2, dtype=torch.int64), torch.zeros(2), torch.zeros(2, dtype=torch.bool)
    request = _C.BatchOut(
        ids, 1, floats, floats, bools, bools, floats, [on_gpu(1, 2)] * 2, None, None, 0, 0, False
    )
    target = _C.GatherTarget(channels_last=False, shifted=False, black=False, height=1, width=1)
    request.add_key(target, on_gpu(1, 2), on_gpu(1, 2))
    with pytest.raises(TypeError, match="next_obs is on cuda:0, but obs is on cuda:1: move one of them"):
        request.add_key(target, on_gpu(1, 2), on_gpu(0, 2))


@pytest.mark.parametrize("wrong", ["index", "priority"])
def test_priorities_on_another_gpu_than_the_buffer_are_refused(wrong):
    given = {"index": torch.zeros(2, dtype=torch.int64), "priority": torch.ones(2)} | {wrong: on_gpu(1, 2)}
    if wrong == "priority":
        given["index"] = on_gpu(0, 2).long()
        given["index"].number = 0
    with pytest.raises(
        ValueError, match=rf"{wrong} is on cuda:1, the buffer on cuda:0: pass {wrong}\.to\('cuda:0'"
    ):
        device_priorities(**given, device=FIRST)


@pytest.mark.needs_cuda
def test_a_buffer_on_the_second_gpu_while_the_first_is_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    from test_buffer import make

    on_cpu, on_second = make(), make(device="cuda:1")
    for _ in range(40):
        assert torch.equal(on_cpu.add(), on_second.add())
    a, b = (
        on_cpu.buffer.sample(16, augment="shift", pad=2),
        on_second.buffer.sample(16, augment="shift", pad=2),
    )
    assert b.obs.device == SECOND
    assert torch.equal(a.obs, b.obs.cpu())
    assert torch.cuda.current_device() == 0


@pytest.mark.needs_cuda
def test_operations_on_the_second_gpu_while_the_first_is_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    from covr_fast import ops

    rewards, ends = torch.rand(50, 3), torch.rand(50, 3) < 0.1
    expected = ops.discounted_returns(rewards, ends, 0.9)
    got = ops.discounted_returns(rewards.to(SECOND), ends.to(SECOND), 0.9)
    torch.testing.assert_close(got.cpu(), expected)
