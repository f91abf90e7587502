"""Arrays that behave like those of a Stable-Baselines3 buffer, for content that is stored in another form."""

from collections.abc import Callable
from typing import Any

import numpy as np

Assign = Callable[[np.ndarray, np.ndarray], None]


class BufferArray(np.ndarray):
    """A copy of a buffer's content, made on every access. A change is passed on or is an error, never lost.

    numpy sees a read-only array. Item assignment and in-place operators pass the changes to
    `assign(flat indices, values)`. Without `assign`, they raise a ValueError with the text `remedy`.
    A slice does not know its place in the buffer and always raises. A copy is an ordinary array.
    """

    assign: Assign | None = None
    remedy = ""
    memory: np.ndarray  # the same array, writable

    def __array_finalize__(self, source: Any) -> None:
        self.remedy = getattr(source, "remedy", "")

    def __setitem__(self, key: Any, value: Any) -> None:
        if self.flags.writeable:
            super().__setitem__(key, value)
            return
        if self.assign is None:
            raise ValueError(self.remedy)
        before, changed = np.array(self), np.array(self)
        changed[key] = value
        which = np.flatnonzero(before != changed)
        self.assign(which, changed.reshape(-1)[which])
        self.memory[...] = changed

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, out: tuple[Any, ...] = (), **options: Any
    ) -> Any:
        given = [np.asarray(value) if isinstance(value, BufferArray) else value for value in inputs]
        if not out:
            return getattr(ufunc, method)(*given, **options)
        targets = tuple(np.array(to) if isinstance(to, BufferArray) else to for to in out)
        result = getattr(ufunc, method)(*given, out=targets, **options)
        for to, target in zip(out, targets, strict=True):
            if isinstance(to, BufferArray):
                to[...] = target
        return out[0] if len(out) == 1 else result


class MemoryArray(np.ndarray):
    """The memory of a buffer, which may be written. If `reshape` or `ravel` has to copy it, the copy is
    read-only, so that no change is lost."""

    def reshape(self, *shape: Any, **options: Any) -> Any:
        return self._view_or_read_only(super().reshape(*shape, **options))

    def ravel(self, *order: Any, **options: Any) -> Any:
        return self._view_or_read_only(super().ravel(*order, **options))

    def _view_or_read_only(self, array: Any) -> Any:
        if not np.may_share_memory(array, self):
            array.flags.writeable = False
        return array


class BufferDict(dict[str, np.ndarray]):
    """The arrays of a dict observation. None of them can be replaced."""

    def __init__(self, arrays: dict[str, np.ndarray], remedy: str) -> None:
        super().__init__(arrays)
        self.remedy = remedy

    def __setitem__(self, key: str, value: Any) -> None:
        self.update()

    def update(self, *args: Any, **values: Any) -> None:
        raise ValueError(self.remedy)

    def __ior__(self, other: Any) -> Any:  # type: ignore[misc]
        self.update()

    def __reduce__(self) -> Any:  # a copy is an ordinary dict
        return dict, (dict(self),)


def guarded(array: np.ndarray, remedy: str, assign: Assign | None = None) -> BufferArray:
    """`array` as a BufferArray; `remedy` is the text of its error."""
    view = array.view(BufferArray)
    view.flags.writeable = False
    view.assign, view.remedy, view.memory = assign, remedy, array
    return view
