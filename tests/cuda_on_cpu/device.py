"""The device "cuda" without a GPU: tensors that say they are on it, and lie in the host's memory.

`install` makes torch and `covr_fast._C` behave as on a machine with one GPU. What runs on "cuda" is the CPU
code of torch and the CUDA kernels of the project, compiled for the CPU. Streams and events exist and have
nothing to do: all work is done when its call returns.
"""

import ctypes
import importlib.util
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from . import runtime

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
_CUDA_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


class DeviceTensor(torch.Tensor):
    """A tensor on cuda:0 whose elements are those of `host`, a CPU tensor of the same shape and strides."""

    host: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor) -> "DeviceTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=CUDA,
        )
        tensor.host = host
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with _Device():  # in a thread that was started by other means than threading.Thread
            return func(*args, **(kwargs or {}))

    # What torch does not send through __torch_dispatch__.

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def tolist(self) -> Any:
        return self.detach().host.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"{self.detach().host!r} on {self.device}"

    def record_stream(self, stream: Any) -> None:
        """Memory is never reused while a tensor lives, and work is done when its call returns."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "DeviceTensor":
        return self.clone()


class _Device(TorchDispatchMode):
    """Runs operators of tensors on "cuda" on their host memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        on_device: dict[int, DeviceTensor] = {}  # by the id of their host tensor

        def to_host(value: Any) -> Any:
            if isinstance(value, DeviceTensor):
                on_device[id(value.host)] = value
                return value.host
            return CPU if isinstance(value, torch.device) and value.type == "cuda" else value

        asked = kwargs.get("device")
        host_args, host_kwargs = tree_map(to_host, (args, kwargs))
        if func.namespace == "covr_fast" and on_device:
            with self:  # the project's own operator, as it is for CUDA
                return func.redispatch(_CUDA_KEY, *args, **kwargs)
        if host_kwargs.get("pin_memory"):  # which torch only has with a GPU
            host_kwargs["pin_memory"] = False
        if func is torch.ops.aten._pin_memory.default:
            return args[0].clone()
        to_cpu = func is torch.ops.aten._to_copy.default and asked == CPU and not kwargs.get("non_blocking")
        if on_device and (func in _WAITING or to_cpu):
            runtime.waits(str(func))
        result = func(*host_args, **host_kwargs)
        if not (asked.type == "cuda" if asked is not None else on_device):
            return result

        def to_device(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return on_device[id(value)] if id(value) in on_device else DeviceTensor(value)

        return tree_map(to_device, result)


# They give the host what the device has computed.
_WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
}


def install(extension: Path) -> None:
    """Replaces `covr_fast._C`, which must not be imported yet, and torch.cuda, for this process.

    Args:
        extension: what build.sh has made.
    """
    if "covr_fast._C" in sys.modules:
        raise RuntimeError("covr_fast was imported before the device was installed")
    folders = extension.resolve().parents[:3]  # a faulty one lies deeper
    ctypes.CDLL(str(next(filter(Path.is_file, (folder / "device_guard.so" for folder in folders)))))
    spec = importlib.util.spec_from_file_location("covr_fast._C", extension)
    if spec is None or spec.loader is None:
        raise ImportError(f"{extension} is not an extension module")
    sys.modules["covr_fast._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["covr_fast._C"])
    runtime.install()
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device="cuda") asks the mode
    _Device().__enter__()
    threading.Thread.run = _in_mode(threading.Thread.run)  # a mode is of one thread


def _in_mode(run: Callable[..., None]) -> Callable[..., None]:
    def run_in_mode(thread: threading.Thread) -> None:
        with _Device():
            run(thread)

    return run_in_mode
