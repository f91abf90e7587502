"""The whole policy update as one CUDA graph."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakMethod

from torch import Tensor

from ..buffer.batch import Batch, BatchSource
from ..cuda_graph import Captured, CudaGraphs, Tensors

FIELDS = ("obs", "action", "reward", "next_obs", "discount", "weight")
EXTRAS = ("prior", "prior_mask")  # read only with `plan.guide`


class Plan(NamedTuple):
    """What an update does besides the critic's step."""

    guide: bool
    """The prior enters the actor's loss."""
    actor: bool
    """Actor and temperature make a step."""
    targets: bool
    """The targets follow."""


Update = Callable[[Batch[Tensor], Plan], dict[str, Tensor]]


class CapturedUpdate:
    """An agent's update that is replayed as a CUDA graph. There is one graph for each plan that comes: with
    and without actor and targets, which some agents update less often, and from the end of the cold start on
    with guidance.

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
        self._captured: dict[tuple[Plan, BatchSource | None], Captured] = {}

    def __call__(self, batch: Batch[Tensor], plan: Plan) -> dict[str, Tensor]:
        """The update's metrics, in new tensors.

        Raises:
            ValueError: the batch has another size, dtype or device than earlier ones.
        """
        run = partial(_run, self._update, plan)
        return self._graph(plan, None, run)(_inputs(batch, plan))

    def sampled(self, source: BatchSource, plan: Plan) -> dict[str, Tensor]:
        """Draws the source's next batch, updates with it and sets its priorities, all in one graph. Returns
        the update's metrics, in new tensors.

        Raises:
            IndexError: nothing can be sampled yet.
        """
        run = partial(_run_sampled, self._update, source, plan)
        with source.turn():
            return self._graph(plan, source, run)({})

    def _graph(
        self, plan: Plan, source: BatchSource | None, run: Callable[[Tensors], dict[str, Tensor]]
    ) -> Captured:
        if (plan, source) not in self._captured:
            self._captured[plan, source] = Captured(run, self._graphs)
        return self._captured[plan, source]

    def forget(self) -> None:
        """Drops the graphs, for when tensors that they change in place (an optimizer's state) were
        replaced."""
        self._captured.clear()


def _weakly(method: Update) -> Update:
    """The method, which does not keep its object: an agent refers to its graphs, and in a cycle the memory of
    both would wait for the garbage collector."""
    reference: Callable[[], Any] = WeakMethod(method)
    return lambda batch, plan: reference()(batch, plan)


def _inputs(batch: Batch[Tensor], plan: Plan) -> dict[str, Tensor]:
    """The tensors that an update reads, by name."""
    inputs = {name: getattr(batch, name) for name in FIELDS}
    return inputs | {name: batch.extras[name] for name in EXTRAS if plan.guide}


def _run(update: Update, plan: Plan, inputs: Tensors) -> dict[str, Tensor]:
    """Calls `update` with a batch made of a graph's static inputs."""
    extras = {name: inputs[name] for name in EXTRAS if plan.guide}
    batch: Any = SimpleNamespace(**{name: inputs[name] for name in FIELDS}, extras=extras)
    return update(batch, plan)


def _run_sampled(update: Update, source: BatchSource, plan: Plan, inputs: Tensors) -> dict[str, Tensor]:
    """Calls `update` with the source's next batch. There are no inputs: every launch draws another batch."""
    source.launch()
    metrics = update(source.batch, plan)
    if source.prioritized:
        source.launch_priorities(metrics["td_error"])
    return metrics
