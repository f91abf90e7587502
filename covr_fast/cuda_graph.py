"""CUDA graphs: a function of tensors is recorded once, and from then on launched as a whole."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]

# torch allows one capture at a time in a process. (Each begins by waiting for the device, too, which CUDA
# forbids while another is under way.) Before torch 2.13 a replay fails, too, while another thread captures:
# all graphs share the state of the device's default generator, whether they draw from it or not.
_capturing = threading.Lock()


class Graphs(Protocol):
    """What `Captured` needs; `CudaGraphs` has it."""

    def turn(self) -> AbstractContextManager[None]:
        """What is done in the block, on the caller's current stream, comes after the turn before."""
        ...

    def aside(self, run: Callable[[], Tensors]) -> Tensors:
        """Runs `run`, prepared for recording it later."""
        ...

    def capture(self, run: Callable[[], Tensors]) -> Callable[[], Tensors]:
        """Records `run` without effect; what is returned replays it and gives its outputs, which are the
        same tensors every time."""
        ...


class CudaGraphs:
    """A side stream, a memory pool and an order for the graphs of one owner.

    What waits for what:

    - A turn waits, by an event, for the end of the turn before, whichever streams the two are on. So inputs
      are not replaced while a graph reads them, and no two graphs use the pool at the same time.
    - Work that is put aside waits for all that the caller's stream was told before; what the caller's stream
      is told afterwards waits for that work.
    - `capture` is the only call in which the host waits for the device: for all of it, once per graph. Other
      threads may launch, allocate and wait for streams of their own meanwhile (the capture's error mode is
      "thread_local"); what they want to replay or capture waits for its end. They may not wait for the whole
      device, nor draw from the device's default generator.
    - A replay runs on the caller's current stream.
    - Nothing waits at the end. Whoever drops a graph does so on a stream that comes after its last turn.

    The graphs share the pool: the memory of one's intermediate results is reused by the others, so a second
    graph of the same function needs little more of it. That is right because they take turns, and because
    what outlives a turn (`Captured` sees to that) is copied out of the pool within it.

    Args:
        device: of all tensors.
        generators: of that device, from which the recorded functions draw. Every replay advances them as the
            function itself would, and starts from whatever state they were given in between.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator] = ()) -> None:
        self._device = device
        self._generators = generators
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._done = torch.cuda.Event()

    @contextmanager
    def turn(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._done)
        yield
        self._done.record(current)

    def aside(self, run: Callable[[], Tensors]) -> Tensors:
        current = torch.cuda.current_stream(self._device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            outputs = run()
        # This is also why no tensor needs record_stream: memory of the side stream is reused by its later
        # work only, and all of that waits for the caller first.
        current.wait_stream(self._side)
        return outputs

    def capture(self, run: Callable[[], Tensors]) -> Callable[[], Tensors]:
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        if not self._graphs:  # a pool ends with the last of its graphs: torch takes its handle no more
            self._pool = torch.cuda.graph_pool_handle()
        with (
            _capturing,
            torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"),
        ):
            outputs = run()
        self._graphs.add(graph)

        def replay() -> Tensors:
            with _capturing:
                graph.replay()
            return outputs

        return replay

    @cached_property
    def _side(self) -> torch.cuda.Stream:
        # Of the first caller's priority, because a graph's kernels keep that of the stream they were recorded
        # on. Recording happens where the function was warmed up: libraries keep a workspace per stream, and
        # autograd's leaves remember theirs.
        priority = torch.cuda.current_stream(self._device).priority
        return torch.cuda.Stream(self._device, priority=priority)


class Captured:
    """A function of named tensors, `function(inputs) -> outputs`, that is replayed as a graph.

    A call gives what `function(inputs)` would give, side effects included, in tensors that are the caller's.
    The first `warm_up` calls run the function itself: what it makes on first use (optimizer state, masks,
    workspaces) then lies outside the graph. The next one records it. From then on, a call copies the inputs
    to static tensors, replays, and copies the outputs, which the next replay overwrites.

    What the recording fixes: the shapes, dtypes and device of the inputs; the addresses of all else that the
    function reads or writes, which must stay where it is and be changed in place only; every Python value.
    The function must not read the device (`item()`, `cpu()`, `nonzero()`).

    What waits for what: as told in `CudaGraphs`; a call is one turn.

    Args:
        function: what to replay. If it refers back to this object, both live until the garbage collector
            comes.
        graphs: where.
        warm_up: calls before the recording, at least 1.
    """

    def __init__(self, function: Callable[[Tensors], Tensors], graphs: Graphs, *, warm_up: int = 3) -> None:
        if warm_up < 1:
            raise ValueError(f"warm_up is {warm_up}: a function must have run before it is recorded")
        self._function = function
        self._graphs = graphs
        self._cold = warm_up
        self._inputs: dict[str, Tensor] = {}
        self._replay: Callable[[], Tensors] | None = None

    def __call__(self, inputs: Tensors) -> dict[str, Tensor]:
        """The function's outputs for `inputs`.

        Raises:
            ValueError: the inputs are not like those of the first call.
        """
        with self._graphs.turn():
            self._take(inputs)
            run = partial(self._function, self._inputs)
            if self._cold > 0:
                self._cold -= 1
                outputs = self._graphs.aside(run)
            else:
                if self._replay is None:
                    self._replay = self._graphs.capture(run)
                outputs = self._replay()
            return {name: value.clone() for name, value in outputs.items()}

    @torch.no_grad()
    def _take(self, inputs: Tensors) -> None:
        """Copies the inputs to the static ones, on the caller's current stream."""
        if not self._inputs:
            self._inputs = {name: torch.empty_like(value) for name, value in inputs.items()}
        if inputs.keys() != self._inputs.keys():
            raise ValueError(f"the inputs are {sorted(inputs)}, captured were {sorted(self._inputs)}")
        for name, own in self._inputs.items():
            if _kind(inputs[name]) != _kind(own):
                raise ValueError(
                    f"{name} is {_kind(inputs[name])}, captured was {_kind(own)}: a graph takes one form of "
                    "inputs only"
                )
        torch._foreach_copy_(list(self._inputs.values()), [inputs[name] for name in self._inputs])


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"
