"""Functions of tensors under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from ..errors import UserError

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, and the gradient of what it returns, compiled at its first call; no graph break is allowed.

    Only functions without state of their own should come here, with modules among their arguments: modules
    stay what they are then, for deep copies and state dicts. Random numbers come in as tensors, since torch
    cannot trace a generator, and compiled code would draw others.

    What is compiled holds for shapes, strides and dtypes as they came, and for the values of Python
    arguments: new ones are compiled anew, for seconds, and torch gives up after a few. Inductor records no
    CUDA graphs of its own in this mode, so the caller may record what it makes.

    Raises (what is returned, when it compiles):
        UserError: the compiler that torch needs is missing or fails.
    """
    fast = torch.compile(function, fullgraph=True, dynamic=False)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return fast(*args, **kwargs)
        except torch._dynamo.exc.ShortenTraceback as error:  # of a backend; others are mistakes in `function`
            said = str(error).splitlines()[0]
            raise UserError(
                f"agent.compile: torch cannot compile here ({said}). On a CPU it needs g++, or the compiler "
                "that CXX names, and Python's headers, on a GPU Triton and a C compiler: install them, or "
                "leave agent.compile off"
            ) from error

    return call
