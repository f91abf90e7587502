"""Action priors off the critical path: the VLM labels stored transitions while the simulation goes on."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from .buffer import ReplayBuffer
from .streams import follow, mark
from .vlm import ActionPrior, PriorBatch


class PriorLabeller:
    """Asks the VLM about stored transitions in a thread and writes its answers into their extras.

    The prior never acts, it only enters the actor loss (Xia et al. 2026, Eq. 4), so nothing has to wait for
    it: a transition that is sampled before its label arrives is masked. The buffer is read and written by
    `step` alone, in the thread that calls it; the worker sees copies of frames. One batch is with the VLM at
    a time, of all that is due up to `max_batch`, newest first: the slower the VLM, the larger its batches. On
    a GPU the worker's stream waits for the frames, and the VLM answers on its own (see `streams`).

    Args:
        prior: the VLM.
        buffer: holds the extras "prior" (A,), "prior_mask" () and "prior_version" ().
        images: ids int64[n] of held transitions -> uint8[n, 3, H, W], what the VLM is to see of them.
        max_batch: most images of one call.
        temperature: of sampling; 0 takes the likeliest answer.
        generator: randomness of sampling; nothing else may use it meanwhile.
    """

    def __init__(
        self,
        prior: ActionPrior,
        buffer: ReplayBuffer,
        images: Callable[[Tensor], Tensor],
        *,
        max_batch: int = 64,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}: it must be at least 1")
        self._prior = prior
        self._buffer = buffer
        self._images = images
        self._max_batch = max_batch
        self._temperature = temperature
        self._generator = generator
        self._wanted = 0  # labels of older versions are to be refreshed
        self._due: list[int] = []
        self._stale: list[int] = []
        self._labelled: deque[int] = deque(maxlen=buffer.capacity)
        threads = torch.get_num_threads()  # a new thread would take what was set last, anywhere
        self._worker = ThreadPoolExecutor(1, "prior-labeller", torch.set_num_threads, (threads,))
        self._asked: tuple[Tensor, Future[PriorBatch]] | None = None
        self.dropped = 0
        """Transitions that the ring overwrote before the VLM had answered."""

    def __len__(self) -> int:
        """Transitions that wait for a label, those with the VLM included."""
        return len(self._due) + len(self._stale) + (0 if self._asked is None else len(self._asked[0]))

    def due(self, ids: Iterable[int]) -> None:
        """These transitions want a label."""
        self._due.extend(ids)

    def refresh(self) -> None:
        """Labels again, behind all that is due, what is labelled so far: after the prior's weights have
        changed."""
        self._wanted = self._prior.version
        self._stale += self._labelled
        self._labelled.clear()

    def step(self) -> int:
        """Writes what the VLM has answered and gives it the next batch; never waits. Returns how many labels
        were written.

        Raises what the worker raised, if it did.
        """
        written = 0
        if self._asked is not None:
            ids, answer = self._asked
            if not answer.done():
                return 0
            self._asked = None
            written = self._write(ids, answer.result())
        ids = self._next_ids()
        if len(ids):
            images = self._images(ids)
            ready = mark(self._prior.device)
            self._asked = ids, self._worker.submit(self._ask, images, ready)
        return written

    def state_dict(self) -> dict[str, Tensor]:
        """What waits for a label, and what has one."""
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
        answer = self._prior(images, temperature=self._temperature, generator=self._generator)
        # Here and not in `step`, which would make the thread that adds wait for the device.
        answer.action = answer.action.cpu()
        return answer

    def _next_ids(self) -> Tensor:
        queue = self._due or self._stale
        ids = torch.tensor(queue[-self._max_batch :], dtype=torch.int64, device="cpu")
        del queue[-self._max_batch :]
        return self._held(ids)

    def _write(self, ids: Tensor, answer: PriorBatch) -> int:
        held = self._buffer.contains(ids)
        kept = self._held(ids)
        self._buffer.set_extras(
            kept,
            prior=answer.action[held],
            prior_mask=torch.ones_like(kept),
            prior_version=torch.full_like(kept, answer.version),
        )
        (self._labelled if answer.version >= self._wanted else self._stale).extend(kept.tolist())
        return len(kept)

    def _held(self, ids: Tensor) -> Tensor:
        held = ids[self._buffer.contains(ids)]
        self.dropped += len(ids) - len(held)
        return held
