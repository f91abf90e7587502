"""The next batch, made in the background while the caller uses the present one."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from .batch import Batch
from .output import Form

if TYPE_CHECKING:
    from .replay import ReplayBuffer


class Prefetch(Iterator[Batch]):
    """What `ReplayBuffer.prefetch` returns: `next()` hands out a batch and a thread starts on the one after.

    The batches are those that `sample` would return, in that order, as long as nothing is added and no
    priority changes in between. Otherwise each is one batch behind: it is drawn from what the buffer held
    when the batch before it was handed out. Calls of `sample` in between take their place in the order; the
    batch that was made for that place is dropped. A batch that nobody asked for counts nowhere: saving,
    pickling and closing leave the buffer as if it had not been made.

    An error in the thread is raised by the `next()` that would have returned its batch. `close`, or leaving
    the `with` block, waits for the thread. Use it in one thread; `add` and `sample` may run in others.
    """

    def __init__(self, buffer: "ReplayBuffer", batch_size: int, form: Form) -> None:
        self._buffer = buffer
        self._request = batch_size, form
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="covr-prefetch")
        self._coming: tuple[int, Future[Batch]] | None = None
        self._closed = False

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("this prefetch was closed: call prefetch() of the buffer for a new one")
        made, batch = None, None
        if self._coming is not None:
            (made, future), self._coming = self._coming, None
            batch = future.result()
        number = self._buffer._next_number()
        if batch is None or made != number:
            batch = self._buffer._sample(number, *self._request)
        self._coming = number + 1, self._worker.submit(self._buffer._sample, number + 1, *self._request)
        return batch

    def close(self) -> None:
        """Ends the thread; the batch it is at is dropped. A second call does nothing."""
        self._closed = True
        self._coming = None
        self._worker.shutdown(cancel_futures=True)

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
