"""Replayed functions equal called ones: the bookkeeping anywhere, the graphs themselves on a GPU."""

import gc
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
from fake_graphs import FakeGraphs

from covr_fast import cuda_graph
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
        assert all(torch.equal(got[name], expected[name]) for name in ("state", "sum"))
        assert torch.equal(function.state, eager.state)
    assert graphs.events == ["aside", "aside", "capture", *["replay"] * 4]


def test_outputs_are_the_callers():
    captured = Captured(Accumulate(), FakeGraphs(), warm_up=1)
    given = [captured(factors(seed)) for seed in range(5)]
    kept = [{name: value.clone() for name, value in outputs.items()} for outputs in given]
    captured(factors(9))
    torch.testing.assert_close(given, kept, rtol=0, atol=0)


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


@pytest.fixture
def recorded(monkeypatch) -> list[tuple[str, object]]:
    """What CudaGraphs asks of torch.cuda, which is replaced."""
    log: list[tuple[str, object]] = []

    class Graph:
        def replay(self):
            log.append(("replay", None))

    class Stream:
        priority = 0

    def record(graph, *, pool, stream, capture_error_mode):
        log.append(("record", pool))
        return nullcontext()

    handles = iter(range(100))
    for name, value in {
        "Event": Stream,
        "CUDAGraph": Graph,
        "Stream": lambda *_, priority: Stream(),
        "device": lambda _: nullcontext(),
        "current_stream": lambda _: Stream(),
        "graph": record,
        "graph_pool_handle": lambda: next(handles),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return log


def test_graphs_share_a_pool_until_the_last_of_them_is_gone(recorded):
    graphs = CudaGraphs(torch.device("cuda"))
    first, second = graphs.capture(dict), graphs.capture(dict)
    del first
    third = graphs.capture(dict)
    del second, third
    graphs.capture(dict)
    assert [pool for _, pool in recorded] == [0, 0, 0, 1]


def test_no_garbage_is_collected_while_a_graph_is_recorded(recorded):
    graphs = CudaGraphs(torch.device("cuda"))
    assert not graphs.capture(lambda: {"x": torch.tensor(gc.isenabled())})()["x"]
    with pytest.raises(KeyError):
        graphs.capture(lambda: {}["x"])
    assert gc.isenabled()


def test_a_replay_waits_while_another_thread_records(recorded):
    replay = CudaGraphs(torch.device("cuda")).capture(dict)
    thread = threading.Thread(target=replay)
    with cuda_graph._capturing:
        thread.start()
        thread.join(0.05)
        assert ("replay", None) not in recorded
    thread.join()
    assert ("replay", None) in recorded


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
def test_cuda_graphs_are_recorded_again_after_all_are_gone():
    """Though a tensor of the old ones, such as a gradient, still lies in their pool."""
    graphs, kept = CudaGraphs(torch.device("cuda")), []

    def function(inputs):
        kept.append(inputs["a"] + inputs["b"])
        return {"x": kept[-1] * 2}

    for seed in range(3):
        captured = Captured(function, graphs, warm_up=1)
        for _ in range(3):
            inputs = factors(seed, "cuda")
            torch.testing.assert_close(captured(inputs)["x"], 2 * (inputs["a"] + inputs["b"]))


@pytest.mark.needs_cuda
def test_cuda_graphs_take_turns_across_streams():
    """Calls from two streams in turn, of which one is slow, are as calls from one."""
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
            if i % 2 == 0:  # on one only: two that are equally late would come in their order anyway
                torch.cuda._sleep(20_000_000)
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
            eager = Accumulate("cuda")
            captured = Captured(Accumulate("cuda"), CudaGraphs(torch.device("cuda")))
            for seed in range(6):
                expected, got = eager(factors(seed, "cuda")), captured(factors(seed, "cuda"))
                assert torch.equal(got["state"], expected["state"])
    finally:
        stop.set()
        thread.join()
    assert not failed
