"""Signals that end a run, handled at a point where nothing is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def deferred_interrupts() -> Iterator[list[int]]:
    """Collects the numbers of received signals in the list that it yields, instead of raising.

    Only a second Ctrl-C raises KeyboardInterrupt at once. SIGINT is always handled, SIGTERM and SIGHUP where
    the program handles them already. A terminal that closes may send several SIGHUPs.
    """
    received: list[int] = []

    def handle(number: int, _frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received  # Python delivers signals to the main thread only
        return
    handled = [n for n in (signal.SIGTERM, signal.SIGHUP) if callable(signal.getsignal(n))]
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, *handled)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def interrupt_afterwards() -> Iterator[None]:
    """Delays an interrupt to the end of the block. It is dropped if the block ends with an error; a second
    Ctrl-C is not delayed."""
    with deferred_interrupts() as received:
        yield
    if received:
        signal.raise_signal(received[0])
