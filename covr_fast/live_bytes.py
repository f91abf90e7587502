"""How much memory code takes, counted tensor by tensor. On the meta device nothing is computed or stored."""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that a block makes on a kind of device, such as "meta".

    Tensors made before the block do not count, nor do views of them. What an operation needs inside (a
    kernel's workspace) is not seen.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device_type = device_type
        self._live: dict[int, int] = {}
        self.now = 0
        """Bytes that are alive."""
        self.peak = 0
        """The most bytes that were alive at a time. May be set back to `now`."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given: set[int] | None = None
        for storage in self._storages(result):
            key = storage._cdata
            if key in self._live:
                continue
            if given is None:
                given = {each._cdata for each in self._storages((args, kwargs))}
            if key not in given:
                self._add(key, storage)
        return result

    def _storages(self, values: Any) -> Iterator[torch.UntypedStorage]:
        if isinstance(values, Tensor):
            if values.device.type == self._device_type:
                yield values.untyped_storage()
        elif isinstance(values, (tuple, list)):
            for value in values:
                yield from self._storages(value)
        elif isinstance(values, dict):
            yield from self._storages(list(values.values()))

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        self._live[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._live.pop(key)


def nbytes(tensors: Iterable[Tensor], *, without: Iterable[Tensor] = ()) -> int:
    """Bytes of memory behind tensors. What several share counts once, what is in `without` not at all."""
    known = {tensor.untyped_storage()._cdata for tensor in without}
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            total += storage.nbytes()
    return total


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors that an object of this package holds, also those in its attributes, lists and modules."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    elif isinstance(value, dict):
        yield from (tensor for each in value.values() for tensor in tensors_in(each, seen))
    elif isinstance(value, (list, tuple)):
        yield from (tensor for each in value for tensor in tensors_in(each, seen))
    elif type(value).__module__.startswith(__package__):
        yield from tensors_in(vars(value), seen)
