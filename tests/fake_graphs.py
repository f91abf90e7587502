"""`covr_fast.cuda_graph.CudaGraphs` without a GPU, so that all that surrounds a graph is tested anywhere."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from covr_fast.cuda_graph import Tensors


class FakeGraphs:
    """As on a GPU, recording has no effect, and replays write into the outputs that the first one gave.

    Here a replay runs the function, on the static inputs that it was recorded with.
    """

    def __init__(self) -> None:
        self.events: list[str] = []
        """What was asked for: "aside", "capture" or "replay"."""

    def turn(self) -> AbstractContextManager[None]:
        return nullcontext()

    def aside(self, run: Callable[[], Tensors]) -> Tensors:
        self.events.append("aside")
        return run()

    def capture(self, run: Callable[[], Tensors]) -> Callable[[], Tensors]:
        self.events.append("capture")
        outputs: dict[str, Tensor] = {}

        def replay() -> Tensors:
            self.events.append("replay")
            for name, value in run().items():
                if name in outputs:
                    outputs[name].copy_(value)
                else:
                    outputs[name] = value.clone()
            return outputs

        return replay
