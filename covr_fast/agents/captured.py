"""The whole policy update as one CUDA graph."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import WeakMethod

from torch import Tensor

from ..buffer.batch import Batch, BatchSource
from ..cuda_graph import Captured, CudaGraphs, Tensors

FIELDS = ("obs", "action", "reward", "next_obs", "discount", "weight")
EXTRAS = ("prior", "prior_mask")  # read only with `guide`

Update = Callable[[Batch[Tensor], bool], dict[str, Tensor]]


class CapturedUpdate:
    """An agent's update that is replayed as a CUDA graph. There is one graph for each value of `guide`, which
    changes once, at the end of the cold start.

    Inside the graph: the whole update, from the encoder's forward pass to the target's; with `sampled`, also
    the kernels that draw and gather the batch, before it, and those that set new priorities, after it.
    Outside, on the caller's stream: the copy of the metrics out of the graph and, of a batch that the caller
    sampled, its copy to the graph's static inputs. That copy reads and writes 8 B C H W bytes for float32 obs
    and next_obs (106 MB each for 256 stacks of 9x76x76), and little else.

    What waits for what: each call is a turn of `graphs` on the caller's current stream. Weights are changed
    in place, so an eager call on that stream (acting, evaluating) sees them as the last update left them.

    `update`, a bound method whose object this does not keep, changes weights and optimizer state in place;
    `graphs` has the generators that it draws from.
    """

    def __init__(self, update: Update, graphs: CudaGraphs) -> None:
        self._update = _weakly(update)
        self._graphs = graphs
        self._captured: dict[tuple[bool, BatchSource | None], Captured] = {}

    def __call__(self, batch: Batch[Tensor], guide: bool) -> dict[str, Tensor]:
        """The update's metrics, in new tensors.

        Raises:
            ValueError: the batch has another size, dtype or device than earlier ones.
        """
        run = partial(_run, self._update, guide)
        return self._graph(guide, None, run)(_inputs(batch, guide))

    def sampled(self, source: BatchSource, guide: bool) -> dict[str, Tensor]:
        """Draws the source's next batch, updates with it and sets its priorities, all in one graph. Returns
        the update's metrics, in new tensors.

        Raises:
            IndexError: nothing can be sampled yet.
        """
        run = partial(_run_sampled, self._update, source, guide)
        with source.turn():
            return self._graph(guide, source, run)({})

    def _graph(
        self, guide: bool, source: BatchSource | None, run: Callable[[Tensors], dict[str, Tensor]]
    ) -> Captured:
        if (guide, source) not in self._captured:
            self._captured[guide, source] = Captured(run, self._graphs)
        return self._captured[guide, source]

    def forget(self) -> None:
        """Drops the graphs, for when tensors that they change in place (an optimizer's state) were
        replaced."""
        self._captured.clear()


def _weakly(method: Update) -> Update:
    """The method, which does not keep its object: an agent refers to its graphs, and in a cycle the memory of
    both would wait for the garbage collector."""
    reference: Callable[[], Any] = WeakMethod(method)
    return lambda batch, guide: reference()(batch, guide)


def _inputs(batch: Batch[Tensor], guide: bool) -> dict[str, Tensor]:
    """The tensors that an update reads, by name."""
    inputs = {name: getattr(batch, name) for name in FIELDS}
    return inputs | {name: batch.extras[name] for name in EXTRAS if guide}


def _run(update: Update, guide: bool, inputs: Tensors) -> dict[str, Tensor]:
    """Calls `update` with a batch made of a graph's static inputs."""
    extras = {name: inputs[name] for name in EXTRAS if guide}
    batch: Any = SimpleNamespace(**{name: inputs[name] for name in FIELDS}, extras=extras)
    return update(batch, guide)


def _run_sampled(update: Update, source: BatchSource, guide: bool, inputs: Tensors) -> dict[str, Tensor]:
    """Calls `update` with the source's next batch. There are no inputs: every launch draws another batch."""
    source.launch()
    metrics = update(source.batch, guide)
    if source.prioritized:
        source.launch_priorities(metrics["td_error"])
    return metrics
