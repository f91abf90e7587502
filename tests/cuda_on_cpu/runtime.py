"""torch.cuda for a device whose work is done when its call returns."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch


class Stream:
    """A stream that never has anything to do."""

    def __init__(self, device: Any = None, priority: int = 0, handle: int = 0, **_: Any) -> None:
        self.device = torch.device("cuda", 0)
        self.priority = priority
        self.cuda_stream = handle

    def wait_stream(self, stream: "Stream") -> None: ...
    def wait_event(self, event: "Event") -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event or Event()


class Event:
    """An event that has happened."""

    def __init__(self, **_: Any) -> None: ...
    def record(self, stream: Stream | None = None) -> None: ...
    def wait(self, stream: Stream | None = None) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _Context:
    """torch.cuda.device: there is one."""

    def __init__(self, device: Any) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


_default = Stream()
_thread = threading.local()  # current: its stream


def _current_stream(device: Any = None) -> Stream:
    return getattr(_thread, "current", _default)


@contextmanager
def _stream(stream: Stream | None) -> Iterator[None]:
    before = _current_stream()
    _thread.current = stream or before
    try:
        yield
    finally:
        _thread.current = before


_modes = ("default", "warn", "error")
_sync_debug_mode = 0


def _set_sync_debug_mode(mode: int | str) -> None:
    global _sync_debug_mode
    _sync_debug_mode = mode if isinstance(mode, int) else _modes.index(mode)


def waits(operation: str) -> None:
    """Called where a GPU would make the host wait; an error while torch's debug mode forbids it."""
    if _modes[_sync_debug_mode] == "error":
        raise RuntimeError(f"{operation} called a synchronizing CUDA operation")


class Generator(torch._C.Generator):
    """One on "cuda" draws as one on the CPU."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        asked = torch.device(device)
        generator = super().__new__(cls, "cpu" if asked.type == "cuda" else asked)
        generator._asked = torch.device("cuda", 0) if asked.type == "cuda" else asked
        return generator

    @property
    def device(self) -> torch.device:
        return self._asked


class CUDAGraph:
    """A recording is not emulated: a test that makes one ends here."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pytest.skip("a CUDA graph cannot be tried without a GPU")


_module_to = torch.nn.Module.to


def _to(module: torch.nn.Module, *arguments: Any, **keywords: Any) -> torch.nn.Module:
    device, *_ = torch._C._nn._parse_to(*arguments, **keywords)
    if device is not None and device.type == "cuda":
        pytest.skip("a network cannot be tried on a GPU that is not there")
    return _module_to(module, *arguments, **keywords)


def _memory_reserved(device: Any = None) -> int:
    """transformers asks for it when it reads the weights of a model onto the device."""
    if sys._getframe(1).f_globals["__name__"].startswith("transformers."):
        pytest.skip("a network cannot be tried on a GPU that is not there")
    return 0


def _reset_peak_memory_stats(device: Any = None) -> None:
    pytest.skip("the memory of a GPU cannot be measured without one")


def _sleep(cycles: int) -> None:
    pytest.skip("work that comes late cannot be tried without a GPU")


def install() -> None:
    """Puts these in the place of torch.cuda's own."""
    stand_ins: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "CUDA on the CPU",
        "get_device_capability": lambda device=None: (9, 0),
        "memory_reserved": _memory_reserved,
        "reset_peak_memory_stats": _reset_peak_memory_stats,
        "mem_get_info": lambda device=None: (8 << 30, 8 << 30),
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda device=None: waits("synchronize"),
        "set_sync_debug_mode": _set_sync_debug_mode,
        "get_sync_debug_mode": lambda: _sync_debug_mode,
        "empty_cache": lambda: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),  # of the generator that "cuda" draws from
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "device": _Context,
        "Stream": Stream,
        "Event": Event,
        "current_stream": _current_stream,
        "default_stream": lambda device=None: _default,
        "stream": _stream,
        "CUDAGraph": CUDAGraph,
        "_sleep": _sleep,
    }
    for name, value in stand_ins.items():
        setattr(torch.cuda, name, value)
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # bitsandbytes asks for it where there is a device
    torch.nn.Module.to = _to  # type: ignore[method-assign,assignment]
    torch.Generator = Generator  # type: ignore[misc]
    torch.Tensor.cuda = lambda self, device=None, non_blocking=False, **_: self.to("cuda")  # type: ignore[method-assign]
