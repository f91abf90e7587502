"""Which implementation of an operation runs, and why another one cannot."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

try:
    from .. import _C
except ImportError as error:  # a checkout that was never built
    raise ImportError(
        "the extension module covr_fast._C is not built: run `pip install .`, or in a checkout "
        "`python setup.py build_ext --inplace`"
    ) from error
from ..architectures import kernel_obstacle, warn_once
from ..streams import current_on

Backend = Literal["auto", "reference", "cpp", "cuda", "triton"]

_BACKENDS = ("auto", "reference", "cpp", "cuda", "triton")
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_Function = TypeVar("_Function", bound=Callable[..., Any])

library = torch.library.Library("covr_fast", "DEF")


def operator(schema: str) -> Callable[[_Function], _Function]:
    """Defines an operator of torch.ops.covr_fast, which the decorated function computes on CPU and CUDA."""
    library.define(schema)

    def register(function: _Function) -> _Function:
        name = f"covr_fast::{schema.partition('(')[0]}"
        torch.library.impl(name, ("cpu", "cuda"), function, lib=library)
        return function

    return register


def fake(name: str) -> Callable[[_Function], _Function]:
    """The decorated function gives a tracer the shapes and dtypes of an operator's results."""

    def register(function: _Function) -> _Function:
        torch.library.register_fake(f"covr_fast::{name}", function, lib=library)
        return function

    return register


def _obstacle(backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot run on tensors of `device`, or None when it can."""
    if backend == "cpp":
        return None if device.type == "cpu" else f"it runs on CPU tensors, and these are on {device}"
    if backend == "cuda":
        if device.type == "cuda" or not _C.with_cuda:
            return kernel_obstacle(device)
        return f"it runs on CUDA tensors, and these are on {device}"
    if not _HAS_TRITON:
        return "Triton is not installed (pip install 'covr-fast[triton]')"
    if device.type == "cpu" and not _INTERPRETED:
        return "on CPU tensors Triton needs its interpreter: set TRITON_INTERPRET=1 before Python starts"
    return None if device.type in ("cpu", "cuda") else f"Triton kernels do not run on {device}"


def select(
    operation: str, backend: str, tensor: Tensor, kernels: Sequence[str], dtypes: Sequence[torch.dtype]
) -> str:
    """The backend to run: `backend` itself, or for "auto" the first of `kernels` that can.

    `kernels` are the operation's implementations besides the reference, fastest first, and `dtypes` what
    they take. "auto" falls back to the reference, and warns where a kernel of another build could run; a
    backend asked for by name that cannot run raises.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"{operation}: backend must be one of {', '.join(_BACKENDS)}, not {backend!r}")
    if backend == "reference":
        return backend
    if backend == "auto":
        if tensor.dtype in dtypes:
            for kernel in kernels:
                # The interpreter is for tests: never picked, only asked for.
                if _obstacle(kernel, tensor.device) is None and not (kernel == "triton" and _INTERPRETED):
                    return kernel
            if tensor.is_cuda and "cuda" in kernels and (obstacle := kernel_obstacle(tensor.device)):
                warn_once(f"backend='auto' runs the reference on {tensor.device}: {obstacle}")
        return "reference"
    if backend not in kernels:
        raise ValueError(f"{operation}: there is no {backend} backend, only reference, {', '.join(kernels)}")
    if (obstacle := _obstacle(backend, tensor.device)) is not None:
        raise RuntimeError(f"{operation}: backend {backend!r} cannot run: {obstacle}")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(
            f"{operation}: backend {backend!r} takes {names}, not {tensor.dtype}; use 'reference'"
        )
    return backend


def stream(tensor: Tensor) -> int:
    """The handle of the stream that the caller's work on this tensor's device is queued on."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


def launch(kernel: str, first: Tensor, *others: Any) -> None:
    """Calls `_C.<kernel>`, or on a GPU `_C.<kernel>_cuda` with the caller's stream as the last argument.

    Raises:
        TypeError: a tensor has not the dtype, shape, device or layout that the kernel takes.
    """
    if not first.is_cuda:
        getattr(_C, kernel)(first, *others)
        return
    for other in others:
        if isinstance(other, Tensor) and other.device != first.device:
            raise TypeError(f"{kernel}: one tensor is on {first.device}, another one on {other.device}")
    with current_on(first.device):
        getattr(_C, f"{kernel}_cuda")(first, *others, stream(first))


def check_floating(operation: str, name: str, tensor: Tensor, shape: str) -> None:
    """Raises unless `tensor` is floating and has as many dimensions as `shape`, such as "[T, N]", names."""
    if tensor.ndim != shape.count(",") + 1 or not tensor.is_floating_point():
        raise ValueError(
            f"{operation}: {name} must be floating {shape}, not {tensor.dtype} {list(tensor.shape)}"
        )


def check_same_device(operation: str, **tensors: Tensor) -> None:
    """Raises unless all tensors, given by argument name, are on one device."""
    (first, anchor), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != anchor.device:
            raise ValueError(
                f"{operation}: {name} is on {tensor.device} but {first} is on {anchor.device}; move one"
            )
