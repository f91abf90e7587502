"""What the buffer's methods are given, checked and made into the arrays that are stored.

A value that its column's dtype cannot represent is an error that names the argument. Only floats may change:
they are rounded to the column's precision. NaN is always an error; infinity is one, except in extras.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .. import _C
from ..streams import send
from .options import ColumnSpec, KeySpec, Options, Shape, Spec


class DLPack(Protocol):
    """An array of any library that exports its memory: JAX, CuPy, Warp, ..."""

    def __dlpack__(self, **options: Any) -> Any: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


Rows = np.ndarray | Tensor | DLPack | Sequence[Any]
ObservationRows = Rows | Mapping[str, Rows]

REWARD = ColumnSpec("reward", (), torch.float32, np.dtype(np.float32), "")
ID = ColumnSpec("id", (), torch.int64, np.dtype(np.int64), "")
FLAG = ColumnSpec("flag", (), torch.bool, np.dtype(np.bool_), "")
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_LARGEST = {n: float(np.finfo(f"f{n}").max) for n in (2, 4, 8)}  # by a float's bytes


def observation(value: ObservationRows, options: Options, what: str) -> list[np.ndarray]:
    """One array [rows, *key.shape] per key, of which each row is contiguous."""
    return [_frames(*given) for given in by_key(value, options, what)]


def by_key(value: ObservationRows, options: Options, what: str) -> list[tuple[Rows, KeySpec, str]]:
    """The rows of each observation key, and how errors name them.

    Raises:
        ValueError: a key has none.
    """
    if options.single:
        return [(value, options.keys[0], what)]  # type: ignore[list-item]
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be a dict with the keys {[key.name for key in options.keys]}")
    if missing := [key.name for key in options.keys if key.name not in value]:
        raise ValueError(f"{what} lacks the keys {missing}")
    return [(value[key.name], key, f"{what}[{key.name!r}]") for key in options.keys]


def columns(action: Rows, extras: Mapping[str, Rows], options: Options) -> list[np.ndarray]:
    """The action and all extras."""
    return [as_column(*given) for given in by_column(action, extras, options)]


def by_column(
    action: Rows, extras: Mapping[str, Rows], options: Options
) -> list[tuple[Rows, ColumnSpec, str]]:
    """The rows of each column, and how errors name them: the action and all extras.

    Raises:
        ValueError: other extras than those declared.
    """
    if extras.keys() != options.extras.keys():
        raise ValueError(f"add() got the extras {sorted(extras)}, declared are {sorted(options.extras)}")
    given = ((extras[name], extra, name) for name, extra in options.extras.items())
    return [(action, options.action, "action"), *given]


def some_extras(values: Mapping[str, Rows], n: int, options: Options) -> dict[str, np.ndarray]:
    """Those of the extras that are given, for n transitions."""
    declared = options.extras
    if unknown := values.keys() - declared.keys():
        raise ValueError(f"set_extras() got {sorted(unknown)}, declared are {sorted(declared)}")
    return {
        name: shaped(as_column(value, declared[name], name), (n, *declared[name].shape), name)
        for name, value in values.items()
    }


def rewards(value: Rows) -> np.ndarray:
    return as_column(value, REWARD, "reward")


def flags(value: Rows, what: str) -> np.ndarray:
    """A bool array; other dtypes are an error."""
    array = as_array(value, what)
    if array.dtype != np.bool_:
        raise ValueError(f"{what} has dtype {array.dtype}: it must be bool")
    return array


def integers(value: Rows, what: str) -> np.ndarray:
    """An int64 array. A bool array is an error: it may be a mask, and would become the numbers 0 and 1."""
    array = as_array(value, what)
    if array.dtype.kind not in "iu" and array.size:
        raise ValueError(
            f"{what} has dtype {array.dtype}: it must be integers; of a mask take np.flatnonzero"
        )
    return as_column(array, ID, what)


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
    at = ids(index).numpy()
    return at, _priority_values(priority, len(at), index)


def device_priorities(index: Rows, priority: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    """(int64 [n], float32 [n]) on a GPU. Of tensors that are there already only the form is checked: their
    values would have to be waited for."""
    if isinstance(index, Tensor) and index.is_cuda:
        check_gpu(index, device, "index")
        if index.dtype != torch.int64:
            raise ValueError(f"index has dtype {index.dtype}: it must be int64, as in a batch")
        at = index.detach().reshape(-1).contiguous()
    else:
        at = send(ids(index), device)
    if isinstance(priority, Tensor) and priority.is_cuda:
        check_gpu(priority, device, "priority")
        values = priority.detach()
        if not (values.is_floating_point() or values.dtype in _INTEGERS):
            raise ValueError(f"priority has dtype {values.dtype}: it must be floating")
        _check_one_per_index(tuple(values.shape), len(at), index)
        return at, values.to(torch.float32).reshape(-1).contiguous()
    array = _priority_values(priority, len(at), index)
    with np.errstate(over="ignore"):
        rounded = array.astype(np.float32)
    if (wrong := np.flatnonzero(~((rounded >= 0) & np.isfinite(rounded)))).size:
        first = int(wrong[0])
        raise ValueError(
            f"priority[{first}] is {array[first]}: priority must be finite and not negative: pass absolute "
            "TD errors"
        )
    return at, send(torch.from_numpy(rounded), device)


def check_gpu(given: Tensor, device: torch.device, what: str) -> None:
    """Raises unless a tensor of a GPU is on this one."""
    if given.device != device:
        raise ValueError(
            f"{what} is on {given.device}, the buffer on {device}: pass {what}.to({str(device)!r})"
        )


def _priority_values(priority: Rows, n: int, index: Rows) -> np.ndarray:
    """float64 [n]."""
    values = as_array(priority, "priority")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"priority has dtype {values.dtype}: it must be floating")
    _check_one_per_index(values.shape, n, index)
    return values.astype(np.float64, copy=False).reshape(-1)


def _check_one_per_index(shape: Shape, n: int, index: Rows) -> None:
    given = tuple(index.shape) if isinstance(index, Tensor) else as_array(index, "index").shape
    if len(shape) > 1 and shape not in ((n, 1), given):
        raise ValueError(f"priority has shape {shape}: it must be {(n,)}, one per index")
    if math.prod(shape) != n:
        raise ValueError(f"priority has {math.prod(shape)} values for {n} transitions")


def as_array(value: Rows, what: str) -> np.ndarray:
    """The same memory, if it is the host's; else a copy."""
    if type(value) is np.ndarray:
        return value
    if isinstance(value := imported(value, what), Tensor):
        value = value.detach().cpu()
        # numpy has no bfloat16, which networks under autocast return. float32 represents all of its values.
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.asarray(value)


def imported(value: Rows, what: str) -> Rows:
    """A tensor on the memory of an object of another library that speaks dlpack; else the value itself."""
    if isinstance(value, Tensor | np.ndarray) or not hasattr(value, "__dlpack__"):
        return value
    try:
        return from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{what} is a {type(value).__name__} that torch.from_dlpack cannot read ({error}): pass a tensor "
            "or an array"
        ) from error


def as_column(value: Rows, spec: Spec, what: str) -> np.ndarray:
    """The same values as a contiguous array of the column's dtype; not a copy if it is one already."""
    return np.asarray(_cast(as_array(value, what), spec, what), order="C")


def _frames(value: Rows, key: KeySpec, what: str) -> np.ndarray:
    array = as_array(value, what)
    if array.shape[1:] != key.shape:
        expected = ", ".join(map(str, ("rows", *key.shape)))
        raise ValueError(f"{what} has shape {array.shape}: it must be [{expected}]")
    array = _cast(array, key, what)
    return array if array[:1].flags.c_contiguous else np.ascontiguousarray(array)


def _cast(array: np.ndarray, spec: Spec, what: str) -> np.ndarray:
    """The array itself if it has the dtype already."""
    dtype = spec.numpy_dtype
    if array.dtype == dtype:
        if dtype.kind == "f":
            _check_floats(array, spec, what)
        return array
    if array.size == 0 and array.dtype.kind in "biuf":
        return array.astype(dtype)
    if array.dtype.kind not in ("biuf" if dtype.kind == "f" else "biu"):
        raise ValueError(f"{what} has dtype {array.dtype}: it must be {dtype}; cast it{or_declare(spec)}")
    if array.dtype.kind == "f":
        _check_floats(array, spec, what)
    elif (wrong := _not_exact(array, dtype)).any():
        _refuse(array, wrong, spec, what, "mend it")
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


def _check_floats(array: np.ndarray, spec: Spec, what: str) -> None:
    """Raises unless every float lies in the range of the column's dtype."""
    largest = _LARGEST[spec.numpy_dtype.itemsize]
    with np.errstate(over="ignore"):  # C++ knows no long double
        known = array if array.dtype.itemsize <= 8 else array.astype(np.float64)
    if _C.all_within(known, largest):
        return
    undefined = np.isnan(array) if spec.infinite else ~np.isfinite(array)
    if undefined.any():
        kind = "NaN" if spec.infinite else "NaN or infinite"
        rows = np.unique(np.argwhere(np.atleast_1d(undefined))[:, 0])[:5].tolist()
        raise ValueError(f"{what} is {kind} in rows {rows}: nothing was stored; mend where it comes from")
    too_large = np.isfinite(array) & (np.abs(array) > np.float64(largest))
    if too_large.any():
        _refuse(array, too_large, spec, what, "scale it")


def _refuse(array: np.ndarray, wrong: np.ndarray, spec: Spec, what: str, remedy: str) -> NoReturn:
    at = np.argwhere(np.atleast_1d(wrong))[0]
    value = np.atleast_1d(array)[tuple(at)]
    raise ValueError(
        f"{what}{at.tolist()} is {value!s}, which {spec.numpy_dtype} cannot hold: "
        f"{remedy}{or_declare(spec)}; nothing was stored"
    )


def or_declare(spec: Spec) -> str:
    """The end of an error's remedy: the constructor's argument that may be changed instead."""
    return f", or build the buffer with another {spec.declared_by}" if spec.declared_by else ""
