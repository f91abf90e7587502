"""Functions of tensors under torch.compile."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from ..errors import UserError

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function` with torch.compile: it and its gradient are compiled at the first call, without graph
    breaks.

    The function must have no state; it takes modules as arguments, so deep copies and state dicts of modules
    work as before. Random numbers are arguments too, because torch cannot trace a generator and compiled code
    would draw other numbers.

    The compiled code is for the shapes, strides, dtypes and Python values of one call. Others are compiled
    again, which takes seconds, and torch gives up after a few times. Inductor records no CUDA graphs in this
    mode, so the caller may record the compiled code.

    Raises (at the call that compiles):
        UserError: the compiler that torch needs is missing or fails.
    """
    fast = torch.compile(function, fullgraph=True, dynamic=False)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return fast(*args, **kwargs)
        except torch._dynamo.exc.ShortenTraceback as error:  # from a backend; others are bugs here
            said = str(error).splitlines()[0]
            raise UserError(
                f"agent.compile: torch cannot compile here ({said}). On a CPU it needs g++, or the compiler "
                "that CXX names, and Python's headers, on a GPU Triton and a C compiler: install them, or "
                "leave agent.compile off"
            ) from error

    return call
