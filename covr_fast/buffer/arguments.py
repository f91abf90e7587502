"""What the buffer's methods are given, checked and made into the arrays that are stored.

A value that its column's dtype cannot represent is an error that names the argument. Only floats may change:
they are rounded to the column's precision. NaN is always an error; infinity is one, except in extras.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from .. import _C
from .observation import ColumnSpec, KeySpec, Shape
from .options import Options

Rows = np.ndarray | Tensor | Sequence[Any]
ObservationRows = Rows | Mapping[str, Rows]

_REWARD, _ID = np.dtype(np.float32), np.dtype(np.int64)
_LARGEST = {n: float(np.finfo(f"f{n}").max) for n in (2, 4, 8)}  # by a float's bytes


class Transitions:
    """Checks the rows of `ReplayBuffer.add` and `set_extras`, for the shapes and dtypes of one buffer."""

    def __init__(self, options: Options) -> None:
        self._keys = options.keys
        self._single = options.single
        self._action, *extras = options.columns
        self._extras = {extra.name: extra for extra in extras}

    def added(
        self,
        obs: ObservationRows,
        action: Rows,
        reward: Rows,
        next_obs: ObservationRows,
        terminated: Rows,
        truncated: Rows,
        env_ids: Rows | None,
        extras: Mapping[str, Rows],
    ) -> tuple[Any, ...]:
        """The arguments of `add` of the C++ core."""
        if extras.keys() != self._extras.keys():
            raise ValueError(f"add() got the extras {sorted(extras)}, declared are {sorted(self._extras)}")
        return (
            self._observation(obs, "obs"),
            self._observation(next_obs, "next_obs"),
            as_column(reward, _REWARD, "reward", ""),
            flags(terminated, "terminated"),
            flags(truncated, "truncated"),
            [
                as_column(action, self._action.numpy_dtype, "action", self._action.declared_by),
                *(_extra(extras[name], column) for name, column in self._extras.items()),
            ],
            None if env_ids is None else integers(env_ids, "env_ids"),
        )

    def extras(self, n: int, values: Mapping[str, Rows]) -> dict[str, np.ndarray]:
        """Some of the extras, for n transitions."""
        if unknown := values.keys() - self._extras.keys():
            raise ValueError(f"set_extras() got {sorted(unknown)}, declared are {sorted(self._extras)}")
        return {
            name: shaped(_extra(value, self._extras[name]), (n, *self._extras[name].shape), name)
            for name, value in values.items()
        }

    def _observation(self, observation: ObservationRows, what: str) -> list[np.ndarray]:
        if self._single:
            return [_observation_rows(observation, self._keys[0], what)]  # type: ignore[arg-type]
        if not isinstance(observation, Mapping):
            raise ValueError(f"{what} must be a dict with the keys {[key.name for key in self._keys]}")
        missing = [key.name for key in self._keys if key.name not in observation]
        if missing:
            raise ValueError(f"{what} lacks the keys {missing}")
        return [_observation_rows(observation[key.name], key, f"{what}[{key.name!r}]") for key in self._keys]


def as_column(
    value: Rows, dtype: np.dtype, what: str, declared_by: str, *, infinite: bool = False
) -> np.ndarray:
    """The same values as a contiguous array of `dtype`; not a copy if it is one already.

    Args:
        what: the argument's name, for errors.
        declared_by: the constructor's argument that says the dtype, "" where none does.
        infinite: infinite values are allowed.

    Raises:
        ValueError: a value that `dtype` cannot represent, floats for integers, or NaN.
    """
    array = as_array(value)
    if array.dtype == dtype:
        _check_floats(array, dtype, what, declared_by, infinite)
        return np.asarray(array, order="C")
    return _cast(array, dtype, what, declared_by, infinite)


def flags(value: Rows, what: str) -> np.ndarray:
    """A bool array; other dtypes are an error."""
    array = as_array(value)
    if array.dtype != np.bool_:
        raise ValueError(f"{what} has dtype {array.dtype}: it must be bool")
    return array


def integers(value: Rows, what: str) -> np.ndarray:
    """An int64 array. A bool array is an error: it may be a mask, and would become the numbers 0 and 1."""
    array = as_array(value)
    if array.dtype.kind not in "iu" and array.size:
        raise ValueError(
            f"{what} has dtype {array.dtype}: it must be integers; of a mask take np.flatnonzero"
        )
    return as_column(array, _ID, what, "")


def ids(index: Rows) -> Tensor:
    """int64 [n]."""
    return torch.from_numpy(integers(index, "index").reshape(-1))


def shaped(array: np.ndarray, shape: Shape, what: str) -> np.ndarray:
    """The array, if it has this shape."""
    if array.shape != shape:
        raise ValueError(f"{what} has shape {array.shape}: it must be {shape}")
    return array


def priorities(index: Rows, priority: Rows) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [n], float64 [n]): ids and their priorities."""
    at, values = ids(index).numpy(), as_array(priority)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"priority has dtype {values.dtype}: it must be floating")
    if values.ndim > 1 and values.shape not in ((len(at), 1), np.shape(index)):
        raise ValueError(f"priority has shape {values.shape}: it must be {(len(at),)}, one per index")
    return at, values.astype(np.float64, copy=False).reshape(-1)


def as_array(value: Rows) -> np.ndarray:
    if type(value) is np.ndarray:
        return value
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        # numpy has no bfloat16, which networks under autocast return. float32 represents all of its values.
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.asarray(value)


def _observation_rows(value: Rows, key: KeySpec, what: str) -> np.ndarray:
    """[rows, *key.shape], of which each row is contiguous."""
    array = as_array(value)
    if array.shape[1:] != key.shape:
        raise ValueError(
            f"{what} has shape {array.shape}: it must be [rows, {', '.join(map(str, key.shape))}]"
        )
    if array.dtype != key.numpy_dtype:
        return _cast(array, key.numpy_dtype, what, "obs_dtype", infinite=False)
    _check_floats(array, key.numpy_dtype, what, "obs_dtype", infinite=False)
    return array if array[:1].flags.c_contiguous else np.ascontiguousarray(array)


def _extra(values: Rows, extra: ColumnSpec) -> np.ndarray:
    return as_column(values, extra.numpy_dtype, extra.name, extra.declared_by, infinite=True)


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
    """Which of these integers or booleans `dtype` cannot represent exactly."""
    low, high = int(array.min()), int(array.max())
    if dtype.kind == "f":
        whole = 2 ** (np.finfo(dtype).nmant + 1)  # up to here a float represents every integer
        if -whole <= low and high <= whole:
            return np.zeros(1, bool)
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = array.astype(dtype)
            back = rounded.astype(array.dtype)
        # Outside the range of the integer dtype, the result of the cast back is undefined.
        beyond = ~np.isfinite(rounded) | (rounded >= np.float64(int(np.iinfo(array.dtype).max) + 1))
        inexact: np.ndarray = beyond | (back != array)
        return inexact
    least, most = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    if least <= low and high <= most:
        return np.zeros(1, bool)
    return np.array([not least <= int(x) <= most for x in array.reshape(-1)]).reshape(array.shape)


def _check_floats(array: np.ndarray, dtype: np.dtype, what: str, declared_by: str, infinite: bool) -> None:
    """Raises unless every float lies in the range of `dtype`. Other arrays pass."""
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
