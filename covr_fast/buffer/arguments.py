"""Rows as they are given to the buffer's methods, made into the arrays that are stored.

What a column's dtype cannot hold is refused by name. Only floats may change: they are rounded to the column's
precision. NaN is refused everywhere, and infinity everywhere but in extras.
"""

from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from .. import _C
from .observation import KeySpec, Shape

Rows = np.ndarray | Tensor | Sequence

_ID = np.dtype(np.int64)
_LARGEST = {n: float(np.finfo(f"f{n}").max) for n in (2, 4, 8)}  # by a float's bytes


def stored_rows(
    value: Rows, dtype: np.dtype, what: str, declared_by: str, *, infinite: bool = False
) -> np.ndarray:
    """As a contiguous array of `dtype`, of the same values; the very array where it is one.

    Args:
        what: the argument's name, for errors.
        declared_by: the constructor's argument that says the dtype, "" where nothing does.
        infinite: infinities are values, too.

    Raises:
        ValueError: a value that `dtype` cannot hold, floats for integers, or NaN.
    """
    array = as_array(value)
    if array.dtype == dtype:
        _check_floats(array, dtype, what, declared_by, infinite)
        return np.asarray(array, order="C")
    return _cast(array, dtype, what, declared_by, infinite)


def observation_rows(value: Rows, key: KeySpec, what: str) -> np.ndarray:
    """Rows of an observation [rows, *key.shape], each of them contiguous."""
    array = as_array(value)
    if array.shape[1:] != key.shape:
        raise ValueError(
            f"{what} has shape {array.shape}: it must be [rows, {', '.join(map(str, key.shape))}]"
        )
    if array.dtype != key.numpy_dtype:
        return _cast(array, key.numpy_dtype, what, "obs_dtype", infinite=False)
    _check_floats(array, key.numpy_dtype, what, "obs_dtype", infinite=False)
    return array if array[:1].flags.c_contiguous else np.ascontiguousarray(array)


def flags(value: Rows, what: str) -> np.ndarray:
    """bool, and given as such."""
    array = as_array(value)
    if array.dtype != np.bool_:
        raise ValueError(f"{what} has dtype {array.dtype}: it must be bool")
    return array


def integers(value: Rows, what: str) -> np.ndarray:
    """int64. A mask would pass for the numbers 0 and 1."""
    array = as_array(value)
    if array.dtype.kind not in "iu" and array.size:
        raise ValueError(
            f"{what} has dtype {array.dtype}: it must be integers; of a mask take np.flatnonzero"
        )
    return stored_rows(array, _ID, what, "")


def ids(index: Rows) -> Tensor:
    """int64 [n]."""
    return torch.from_numpy(integers(index, "index").reshape(-1))


def shaped(array: np.ndarray, shape: Shape, what: str) -> np.ndarray:
    """The array, if it has this shape."""
    if array.shape != shape:
        raise ValueError(f"{what} has shape {array.shape}: it must be {shape}")
    return array


def as_array(value: Rows) -> np.ndarray:
    if type(value) is np.ndarray:
        return value
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        # numpy has no bfloat16, as networks under autocast give it; float32 holds all of its values.
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.asarray(value)


def _cast(array: np.ndarray, dtype: np.dtype, what: str, declared_by: str, infinite: bool) -> np.ndarray:
    if array.size == 0 and array.dtype.kind in "biuf":
        return array.astype(dtype)
    if array.dtype.kind not in ("biuf" if dtype.kind == "f" else "biu"):
        raise ValueError(
            f"{what} has dtype {array.dtype}: it must be {dtype}; cast it{_or_declare(declared_by)}"
        )
    if array.dtype.kind == "f":
        _check_floats(array, dtype, what, declared_by, infinite)
    elif (wrong := _not_exact(array, dtype)).any():
        _refuse(array, wrong, f"which {dtype} cannot hold: mend it{_or_declare(declared_by)}", what)
    return array.astype(dtype, order="C")


def _not_exact(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Which of these integers or booleans `dtype` does not hold."""
    low, high = int(array.min()), int(array.max())
    if dtype.kind == "f":
        whole = 2 ** (np.finfo(dtype).nmant + 1)  # up to here a float holds every integer
        if -whole <= low and high <= whole:
            return np.zeros(1, bool)
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = array.astype(dtype)
            back = rounded.astype(array.dtype)
        # Beyond the integers' own range the cast back means nothing.
        beyond = ~np.isfinite(rounded) | (rounded >= np.float64(int(np.iinfo(array.dtype).max) + 1))
        return beyond | (back != array)
    least, most = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    if least <= low and high <= most:
        return np.zeros(1, bool)
    return np.array([not least <= int(x) <= most for x in array.reshape(-1)]).reshape(array.shape)


def _check_floats(array: np.ndarray, dtype: np.dtype, what: str, declared_by: str, infinite: bool) -> None:
    """Raises unless every float is a number that `dtype` has room for; passes what are no floats."""
    if array.dtype.kind != "f":
        return
    with np.errstate(over="ignore"):  # C++ knows no long double
        known = array if array.dtype.itemsize <= 8 else array.astype(np.float64)
    if _C.all_within(known, _LARGEST[dtype.itemsize]):
        return
    undefined = np.isnan(array) if infinite else ~np.isfinite(array)
    if undefined.any():
        kind = "NaN" if infinite else "NaN or infinite"
        rows = np.unique(np.argwhere(np.atleast_1d(undefined))[:, 0])[:5].tolist()
        raise ValueError(f"{what} is {kind} in rows {rows}: nothing was stored; mend where it comes from")
    too_large = np.isfinite(array) & (np.abs(array) > np.float64(_LARGEST[dtype.itemsize]))
    if too_large.any():
        _refuse(array, too_large, f"which {dtype} cannot hold: scale it{_or_declare(declared_by)}", what)


def _refuse(array: np.ndarray, wrong: np.ndarray, why: str, what: str) -> NoReturn:
    at = np.argwhere(np.atleast_1d(wrong))[0]
    value = np.atleast_1d(array)[tuple(at)]
    raise ValueError(f"{what}{at.tolist()} is {value!s}, {why}; nothing was stored")


def _or_declare(argument: str) -> str:
    return f", or build the buffer with another {argument}" if argument else ""
