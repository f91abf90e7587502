"""Which GPUs the CUDA kernels of this build run on, and the remedy where they do not."""

import re
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

from . import _C

_ARCHITECTURE = re.compile(r"(\d+)(\d)([af]?)(-real|-virtual)?")
_warned: set[str] = set()

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _constant_in_graphs(function: _Function) -> _Function:
    """torch.compile takes the function's answer as a constant: it can trace neither a query nor a warning.

    As torch.compiler.assume_constant_result, which imports the whole compiler: seconds for everybody.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether kernels that were compiled for `architectures` run on a GPU of this compute capability.

    Args:
        architectures: in CMake's syntax, separated by commas: "80-real,90". A number with "-real" is machine
            code, with "-virtual" PTX, alone both.
        capability: (major, minor), as torch.cuda.get_device_capability gives it.

    Raises:
        ValueError: an architecture is written in another way.
    """
    return any(_one_runs_on(name, capability) for name in architectures.split(",") if name)


def _one_runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    match = _ARCHITECTURE.fullmatch(architecture)
    if match is None:
        raise ValueError(f"architectures: {architecture!r} is not written as 90, 90-real or 90-virtual")
    major, minor, features, form = match.groups()
    built = (int(major), int(minor))
    if features == "a":  # instructions that no other GPU has
        return built == capability
    # Machine code and a family's features are for later GPUs of one generation, PTX for all later ones.
    same_generation = built[0] == capability[0] and built <= capability
    return same_generation or (form != "-real" and not features and built <= capability)


@_constant_in_graphs
def kernel_obstacle(device: torch.device) -> str | None:
    """Why the CUDA kernels of this build cannot run on a CUDA device, or None when they can."""
    if not _C.with_cuda:
        return "this build has no CUDA kernels (rebuild with nvcc on PATH and COVR_CUDA=ON)"
    return _obstacle_at(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _obstacle_at(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if runs_on(_C.cuda_architectures, capability):
        return None
    number = f"{capability[0]}{capability[1]}"
    return (
        f"this build's CUDA kernels are for architectures {_C.cuda_architectures}, and "
        f"{torch.cuda.get_device_name(index)} is {number} (rebuild with COVR_CUDA_ARCHITECTURES={number})"
    )


@_constant_in_graphs
def warn_once(reason: str) -> None:
    """Warns that something slower runs instead of the CUDA kernels, once for each reason."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(reason, RuntimeWarning, stacklevel=2)
