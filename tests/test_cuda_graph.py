"""Replayed functions equal called ones: the bookkeeping anywhere, the graphs themselves on a GPU."""

import gc
import threading
import weakref

import pytest
import torch
from fake_graphs import FakeGraphs

from covr_fast.cuda_graph import Captured, CudaGraphs


class Accumulate:
    """state += a @ b, in place; returns the state (itself!) and its sum."""

    def __init__(self, device="cpu"):
        self.state = torch.zeros(3, 3, device=device)

    def __call__(self, inputs):
        self.state += inputs["a"] @ inputs["b"]
        return {"state": self.state, "sum": self.state.sum()}


def factors(seed, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.rand(3, 3, generator=g).to(device) for name in ("a", "b")}


def test_calls_equal_the_function_and_have_its_side_effects():
    eager, function, graphs = Accumulate(), Accumulate(), FakeGraphs()
    captured = Captured(function, graphs, warm_up=2)
    for seed in range(6):
        expected = eager(factors(seed))
        got = captured(factors(seed))
        assert torch.equal(got["state"], expected["state"])
        assert torch.equal(got["sum"], expected["sum"])
        assert torch.equal(function.state, eager.state)
    assert graphs.events == ["aside", "aside", "capture", *["replay"] * 4]


def test_outputs_are_the_callers():
    captured = Captured(Accumulate(), FakeGraphs(), warm_up=1)
    given = [captured(factors(seed)) for seed in range(5)]
    kept = [{name: value.clone() for name, value in outputs.items()} for outputs in given]
    captured(factors(9))
    for outputs, copies in zip(given, kept, strict=True):
        assert all(torch.equal(outputs[name], copies[name]) for name in outputs)


def test_inputs_are_copied_and_not_kept():
    """A caller may overwrite what it passed, and pass tensors at other addresses and with other strides."""
    eager = Accumulate()
    captured = Captured(Accumulate(), FakeGraphs(), warm_up=1)
    for seed in range(4):
        inputs = factors(seed)
        if seed % 2:
            inputs["a"] = inputs["a"].T.contiguous().T
        expected, got = eager(inputs), captured(inputs)
        for value in inputs.values():
            value.fill_(torch.nan)
        assert torch.equal(got["state"], expected["state"])


def test_other_forms_of_inputs_are_refused():
    captured = Captured(Accumulate(), FakeGraphs())
    captured(factors(0))
    with pytest.raises(ValueError, match=r"a is float32\[1, 3\] on cpu, captured was float32\[3, 3\] on cpu"):
        captured(factors(0) | {"a": torch.ones(1, 3)})  # would broadcast
    with pytest.raises(ValueError, match=r"a is float64\[3, 3\]"):
        captured(factors(0) | {"a": torch.ones(3, 3).double()})
    with pytest.raises(ValueError, match=r"the inputs are \['a'\]"):
        captured({"a": torch.ones(3, 3)})
    with pytest.raises(ValueError, match="warm_up is 0"):
        Captured(Accumulate(), FakeGraphs(), warm_up=0)


def test_is_freed_without_the_garbage_collector():
    gc.disable()
    try:
        function = Accumulate()
        gone = weakref.ref(function)
        captured = Captured(function, FakeGraphs(), warm_up=1)
        for seed in range(3):
            captured(factors(seed))
        del function, captured
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.needs_cuda
def test_cuda_replays_equal_the_function():
    eager, function = Accumulate("cuda"), Accumulate("cuda")
    captured = Captured(function, CudaGraphs(torch.device("cuda")), warm_up=2)
    given = []
    for seed in range(8):
        expected = {name: value.clone() for name, value in eager(factors(seed, "cuda")).items()}
        given.append((captured(factors(seed, "cuda")), expected))
    for got, expected in given:
        assert torch.equal(got["state"], expected["state"])
    assert torch.equal(function.state, eager.state)


@pytest.mark.needs_cuda
def test_cuda_replays_advance_the_generator():
    """The same numbers as without a graph, also after the state was set and where both kinds of calls mix."""
    plain, generator = (torch.Generator("cuda").manual_seed(5) for _ in range(2))

    def draw(inputs):
        return {"x": inputs["offset"] + torch.randn(1000, device="cuda", generator=generator)}

    captured = Captured(draw, CudaGraphs(torch.device("cuda"), [generator]), warm_up=1)
    offset = {"offset": torch.zeros(1000, device="cuda")}
    drawn = []
    for call in range(8):
        if call == 5:
            plain.manual_seed(6)
            generator.set_state(plain.get_state())
        run = draw if call == 6 else captured  # the function itself, between replays
        x = run(offset)["x"]
        assert torch.equal(x, torch.randn(1000, device="cuda", generator=plain)), call
        drawn.append(x)
    assert torch.equal(generator.get_state(), plain.get_state())
    assert len({tuple(x[:4].tolist()) for x in drawn}) == len(drawn)


@pytest.mark.needs_cuda
def test_cuda_graphs_take_turns_across_streams():
    """Calls from two streams in turn, each with a slow producer, are as calls from one."""
    eager, function = Accumulate("cuda"), Accumulate("cuda")
    graphs = CudaGraphs(torch.device("cuda"))
    captured = Captured(function, graphs, warm_up=1)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    given = []
    for seed in range(12):
        inputs = factors(seed, "cuda")
        given.append((inputs, {n: v.clone() for n, v in eager(inputs).items()}))
    torch.cuda.synchronize()
    got = []
    for i, (inputs, _) in enumerate(given):
        with torch.cuda.stream(streams[i % 2]):
            torch.cuda._sleep(2_000_000)
            got.append(captured(inputs))
    torch.cuda.synchronize()
    for outputs, (_, expected) in zip(got, given, strict=True):
        assert torch.equal(outputs["state"], expected["state"])


@pytest.mark.needs_cuda
def test_cuda_capture_beside_a_busy_thread():
    """Another thread allocates, launches and reads its own results while graphs are recorded."""
    stop, failed = threading.Event(), []

    def work():
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                size = 1000
                while not stop.is_set():
                    size += 1  # another allocation each time
                    x = torch.ones(size, 100, device="cuda")
                    assert (x.T @ x)[0, 0].item() == size
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(20):
            eager, captured = (
                Accumulate("cuda"),
                Captured(Accumulate("cuda"), CudaGraphs(torch.device("cuda"))),
            )
            for seed in range(6):
                expected, got = eager(factors(seed, "cuda")), captured(factors(seed, "cuda"))
                assert torch.equal(got["state"], expected["state"])
    finally:
        stop.set()
        thread.join()
    assert not failed
