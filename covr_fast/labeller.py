"""Action priors in the background: the VLM labels stored transitions while the simulation goes on."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from .buffer import ReplayBuffer
from .logger import MeanMetrics
from .staleness import Trust
from .streams import follow, mark
from .vlm import ActionPrior, PriorBatch

MAX_BATCH = 64
"""Images of one call, unless the labeller is told otherwise."""


class PriorLabeller:
    """Asks the VLM about stored transitions in a thread, and writes its answers into their extras.

    The prior never acts: it is only part of the actor loss (Xia et al. 2026, Eq. 4). So nothing has to wait
    for it; a transition that is sampled before its label arrives is masked. Only `step` reads and writes the
    buffer, in the thread that calls it; the worker thread gets copies of frames. The VLM gets one batch at a
    time: the newest due transitions, at most `max_batch`. So a slow VLM gets large batches. On a GPU the
    worker's stream waits for the frames, and the VLM answers on its own stream (see `streams`).

    Args:
        buffer: has the extras "prior" (A,), "prior_mask" () and "prior_version" ().
        images: ids int64[n] of stored transitions -> uint8[n, 3, H, W], their images for the VLM.
        max_batch: most images of one call.
        temperature: of sampling; 0 takes the most probable answer.
        generator: randomness of sampling; nothing else may use it at the same time.
        trust: an answer of weights that it does not trust when the answer arrives is written, but does not
            guide. None: it trusts all.
        confidence: the mask is the VLM's confidence (`PriorBatch.confidence`) instead of 1.
    """

    def __init__(
        self,
        prior: ActionPrior,
        buffer: ReplayBuffer,
        images: Callable[[Tensor], Tensor],
        *,
        max_batch: int = MAX_BATCH,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        trust: Trust | None = None,
        confidence: bool = False,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}: it must be at least 1")
        self._prior = prior
        self._buffer = buffer
        self._images = images
        self._max_batch = max_batch
        self._temperature = temperature
        self._generator = generator
        self._trust = trust or Trust()
        self._confidence = confidence
        self._wanted = 0  # labels of older versions of the weights are made again
        self._due: list[int] = []
        self._stale: list[int] = []
        self._labelled: deque[int] = deque(maxlen=buffer.capacity)
        threads = torch.get_num_threads()  # a new thread would use the count set last in any thread
        self._worker = ThreadPoolExecutor(1, "prior-labeller", torch.set_num_threads, (threads,))
        self._asked: tuple[Tensor, Future[PriorBatch]] | None = None
        self.latest: tuple[Tensor, PriorBatch] | None = None
        """The transitions int64[n] of the VLM's last answers, and these."""
        self.dropped = 0
        """Transitions that the ring overwrote before the VLM had answered."""
        self.metrics = MeanMetrics()
        """Means over what was written: "prior_to_action", the squared distance from the prior to the executed
        action, and "prior_confidence", if it is asked for."""

    def __len__(self) -> int:
        """Transitions that wait for a label, including those that the VLM is labelling."""
        return len(self._due) + len(self._stale) + (0 if self._asked is None else len(self._asked[0]))

    def due(self, ids: Iterable[int]) -> None:
        """Adds transitions that need a label."""
        self._due.extend(ids)

    def refresh(self) -> None:
        """Makes all labels again, after all due ones. To be called when the prior's weights have changed."""
        self._wanted = self._prior.version
        self._stale += self._labelled
        self._labelled.clear()

    def step(self) -> int:
        """Writes the VLM's answers, if it has finished, and gives it the next batch. Never waits.

        Raises the exception of the worker thread, if there was one.

        Returns:
            How many labels were written.
        """
        written = 0
        if self._asked is not None:
            ids, answer = self._asked
            if not answer.done():
                return 0
            self._asked = None
            self.latest = ids, answer.result()
            written = self._write(*self.latest)
        queue = self._due or self._stale
        ids = self._stored(torch.tensor(queue[-self._max_batch :], dtype=torch.int64, device="cpu"))
        del queue[-self._max_batch :]
        if len(ids):
            images = self._images(ids)
            ready = mark(self._prior.device)
            self._asked = ids, self._worker.submit(self._ask, images, ready)
        return written

    def state_dict(self) -> dict[str, Tensor]:
        """The transitions that wait for a label, and those that have one."""
        asked = [] if self._asked is None else self._asked[0].tolist()
        lists = {"due": asked + self._due, "stale": self._stale, "labelled": list(self._labelled)}
        return {name: torch.tensor(ids, dtype=torch.int64, device="cpu") for name, ids in lists.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._due = state["due"].tolist()
        self._stale = state["stale"].tolist()
        self._labelled.extend(state["labelled"].tolist())

    def close(self) -> None:
        """Waits for the call in progress, drops its answer and ends the thread."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _ask(self, images: Tensor, ready: "torch.cuda.Event | None") -> PriorBatch:
        follow(ready, self._prior.device)
        answer = self._prior(
            images,
            temperature=self._temperature,
            generator=self._generator,
            confidence=self._confidence,
        )
        # Here and not in `step`, because this waits for the device.
        answer.action = answer.action.cpu()
        if answer.confidence is not None:
            answer.confidence = answer.confidence.cpu()
        return answer

    def _write(self, ids: Tensor, answer: PriorBatch) -> int:
        answered = self._buffer.contains(ids)
        ids = self._stored(ids)
        guides = answer.version >= self._trust.oldest(self._prior.version)
        weight = torch.ones_like(ids) if answer.confidence is None else answer.confidence[answered]
        if len(ids):
            action = self._buffer.actions(ids).to(answer.action)
            self.metrics.add({"prior_to_action": (answer.action[answered] - action).square().sum(-1)})
            if self._confidence:
                self.metrics.add({"prior_confidence": weight})
        self._buffer.set_extras(
            ids,
            prior=answer.action[answered],
            prior_mask=weight * guides,
            prior_version=torch.full_like(ids, answer.version),
        )
        (self._labelled if answer.version >= self._wanted else self._stale).extend(ids.tolist())
        return len(ids)

    def _stored(self, ids: Tensor) -> Tensor:
        """Those of `ids` that the ring has not overwritten; counts the others as dropped."""
        stored = ids[self._buffer.contains(ids)]
        self.dropped += len(ids) - len(stored)
        return stored
