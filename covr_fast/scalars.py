"""Checks for numbers in arguments, which may be Python's, numpy's or torch's."""

import operator
from numbers import Real
from typing import Any

import numpy as np


def as_int(value: Any, what: str) -> int:
    """`value` as an int. Booleans and all floats, 2.0 too, raise a TypeError that names `what`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{what} is {value!r}: it must be an integer") from None


def as_float(value: Any, what: str) -> float:
    """`value` as a float. Booleans and all but real numbers raise a TypeError that names `what`."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        raise TypeError(f"{what} is {value!r}: it must be a number")
    return float(value)
