"""What to do when a GPU's memory is full."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def out_of_memory(doing: str, remedy: str) -> Iterator[None]:
    """Turns torch's out-of-memory error into a MemoryError of one line that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"out of GPU memory while {doing}: {remedy}") from error
