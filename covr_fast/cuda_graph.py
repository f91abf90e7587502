"""CUDA graphs: a function of tensors is recorded once, then launched as a whole."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial

import torch
from torch import Tensor

from .streams import current_on

Tensors = Mapping[str, Tensor]

# torch allows one capture at a time in a process. (Each begins by waiting for the device, which CUDA forbids
# during another capture.) Before torch 2.13 a replay also fails while another thread captures: all graphs
# share the state of the device's default generator, whether they draw from it or not.
_capturing = threading.Lock()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage may be an old graph, or pinned pages whose release waits for the device: either would make a
    recording fail."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class CudaGraphs:
    """A side stream, a memory pool and an order for the graphs of one owner.

    What waits for what:

    - A turn waits, by an event, for the end of the previous turn, on whatever streams the two are. So inputs
      are not replaced while a graph reads them, and no two graphs use the pool at the same time.
    - Work in `aside` waits for all earlier work of the caller's stream; later work of the caller's stream
      waits for it.
    - `capture` is the only call in which the host waits for the device: for all of it, once per graph.
      Meanwhile other threads may launch, allocate and wait for their own streams (the capture's error mode is
      "thread_local"); their replays and captures wait for its end. They must not wait for the whole device,
      nor draw from the device's default generator.
    - A replay runs on the caller's current stream.
    - Deleting a graph waits for nothing: delete it on a stream whose work comes after the graph's last turn.

    The graphs share the pool: each reuses the memory of the others' intermediate results, so a second graph
    of the same function needs little more memory. That is safe because they take turns, and because
    `Captured` copies the outputs out of the pool within the turn.

    Args:
        device: the device of all tensors.
        generators: those of this device from which the recorded functions draw. Every replay advances them as
            the function itself would, from the state that they have then.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator] = ()) -> None:
        self._device = device
        self._generators = generators
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._done = torch.cuda.Event()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The block's work, on the caller's current stream, runs after that of the previous turn."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._done)
        yield
        self._done.record(current)

    def aside(self, run: Callable[[], Tensors]) -> Tensors:
        """Runs `run` on the stream on which it will be recorded."""
        current = torch.cuda.current_stream(self._device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            outputs = run()
        # No tensor needs record_stream: only later work of the side stream reuses its memory, and all of that
        # waits for the caller first.
        current.wait_stream(self._side)
        return outputs

    def capture(self, run: Callable[[], Tensors]) -> Callable[[], Tensors]:
        """Records `run` without executing it. Returns a function that replays it and returns its outputs, the
        same tensors every time."""
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        if not self._graphs:  # torch deletes a pool with its last graph; the handle is then invalid
            self._pool = torch.cuda.graph_pool_handle()
        with (
            _capturing,
            _no_collection(),
            current_on(self._device),  # whose work torch waits for before it records
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
        # With the first caller's priority, because a graph's kernels keep the priority of the stream on which
        # they were recorded. The function is warmed up on the same stream: libraries keep a workspace per
        # stream, and autograd's leaves remember their stream.
        priority = torch.cuda.current_stream(self._device).priority
        return torch.cuda.Stream(self._device, priority=priority)


class Captured:
    """A function of named tensors, `function(inputs) -> outputs`, that is replayed as a graph.

    A call has the result and the side effects of `function(inputs)`; the caller owns the returned tensors.
    The first `warm_up` calls run the function itself, so that everything it creates on first use (optimizer
    state, masks, workspaces) is outside the graph. The next call records it. Every call from then on copies
    the inputs to static tensors, replays, and copies the outputs, which the next replay overwrites.

    The recording fixes the shapes, dtypes and device of the inputs, every Python value, and the addresses of
    all other tensors that the function reads or writes: these must be changed in place only. The function
    must not read the device (`item()`, `cpu()`, `nonzero()`).

    What waits for what: see `CudaGraphs`; a call is one turn.

    Args:
        function: the function to replay. If it refers to this object, both live until the garbage collector
            runs.
        graphs: records and replays it.
        warm_up: calls before the recording, at least 1.
    """

    def __init__(
        self, function: Callable[[Tensors], Tensors], graphs: CudaGraphs, *, warm_up: int = 3
    ) -> None:
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
            ValueError: the inputs differ from those of the first call in names, shapes, dtypes or device.
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
            copies = {name: torch.empty_like(value) for name, value in outputs.items()}
            torch._foreach_copy_(list(copies.values()), list(outputs.values()))  # one launch
            return copies

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
        if inputs:
            torch._foreach_copy_(list(self._inputs.values()), [inputs[name] for name in self._inputs])


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"
