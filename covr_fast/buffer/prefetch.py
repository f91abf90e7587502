"""The next batch, made in the background while the caller uses the present one."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from .batch import Batch


class Prefetch(Iterator[Batch]):
    """What `ReplayBuffer.prefetch` returns: `next()` hands out a batch, and a thread starts on the next one.

    If nothing is added and no priority changes, the batches are those of `sample`, in the same order.
    Otherwise each is one batch late: it is drawn from what was stored when the batch before it was handed
    out. A call of `sample` in between takes its place in the order, and the batch that was made for that
    place is dropped. A batch that nobody asked for does not count: saving, pickling and closing leave the
    buffer as if it had not been made.

    An error in the thread is raised by the `next()` that would have returned its batch. `close`, or leaving
    the `with` block, waits for the thread. Use it in one thread; `add` and `sample` may run in others.

    Args:
        next_number: the number of the batch that comes next, which then counts as drawn.
        draw: makes the batch of a number.
    """

    def __init__(self, next_number: Callable[[], int], draw: Callable[[int], Batch]) -> None:
        self._next_number = next_number
        self._draw = draw
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="covr-prefetch")
        self._coming: tuple[int, Future[Batch]] | None = None
        self._closed = False

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("this prefetch was closed: call prefetch() of the buffer for a new one")
        coming, self._coming = self._coming, None
        made, batch = (None, None) if coming is None else (coming[0], coming[1].result())
        number = self._next_number()
        if batch is None or made != number:
            batch = self._draw(number)
        self._coming = number + 1, self._worker.submit(self._draw, number + 1)
        return batch

    def close(self) -> None:
        """Ends the thread and drops the batch that it is making. A second call does nothing."""
        self._closed = True
        self._coming = None
        self._worker.shutdown(cancel_futures=True)

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
