"""Numbers as they are given to constructors: Python's, numpy's, torch's."""

import operator
from numbers import Real
from typing import Any

import numpy as np


def as_int(value: Any, what: str) -> int:
    """A plain int. Booleans and floats, whole ones too, are a TypeError that names `what`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{what} is {value!r}: it must be an integer") from None


def as_float(value: Any, what: str) -> float:
    """A plain float. Booleans and what is no real number are a TypeError that names `what`."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        raise TypeError(f"{what} is {value!r}: it must be a number")
    return float(value)
