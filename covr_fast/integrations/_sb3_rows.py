"""What Stable-Baselines3's `add` is given, in the shapes and dtypes that are stored. A value that would be
stored as another one is an error that names the argument."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Infos = Sequence[Mapping[str, Any]] | Mapping[str, Any]
Shape = tuple[int, ...]
Observations = dict[str, np.ndarray]


class Rows(NamedTuple):
    """One transition per environment, in the order of `ReplayBuffer.add`. Arrays are [n_envs, ...]."""

    obs: Observations
    action: np.ndarray
    reward: np.ndarray
    next_obs: Observations
    terminated: np.ndarray
    truncated: np.ndarray


def as_rows(value: Any, n_envs: int, shape: Shape, dtype: Any, what: str, *others: Shape) -> np.ndarray:
    """`value` as [n_envs, *shape] of this dtype.

    Args:
        others: further shapes that a row may have, with the same number of elements. With one environment,
            the axis of environments may be missing.

    Raises:
        ValueError: another shape, or a value that the dtype cannot represent. Floats are rounded to narrower
            floats, as SB3 does.
    """
    array = np.asarray(value)
    rows = (shape, *others)
    accepted = [(n_envs, *row) for row in rows] + [row for row in rows if n_envs == 1]
    if array.shape not in accepted:
        raise ValueError(f"{what} has shape {array.shape}: it must be {accepted[0]}, one row per environment")
    return _cast(array, np.dtype(dtype), what).reshape(n_envs, *shape)


def as_flags(value: Any, n_envs: int, what: str) -> np.ndarray:
    """bool [n_envs], of booleans or of zeros and ones."""
    return as_rows(value, n_envs, (), bool, what, (1,))


def timeouts(infos: Infos, n_envs: int) -> np.ndarray:
    """bool [n_envs]: which were truncated, from SB3's list of infos or from gymnasium's dict of arrays."""
    name = "TimeLimit.truncated"
    if isinstance(infos, Mapping):
        return as_flags(infos.get(name, np.zeros(n_envs, bool)), n_envs, f"infos[{name!r}]")
    if len(infos) != n_envs:
        raise ValueError(f"infos has {len(infos)} entries: it must have one per environment, {n_envs}")
    return np.array([bool(info.get(name, False)) for info in infos])


def _cast(array: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
    """Unlike `ReplayBuffer.add`, SB3 accepts whole floats for integers, and 0 and 1 for booleans."""
    if array.dtype == dtype:
        return array
    with np.errstate(invalid="ignore", over="ignore"):
        stored = array.astype(dtype)
        if array.dtype.kind == dtype.kind == "f":
            return stored
        # Compared in both dtypes. In one only, 16777217 equals its float32, or -1 its uint64.
        changed = (stored != array) | (stored.astype(array.dtype) != array)
    if changed.any():
        given, kept = array[changed].flat[0], stored[changed].flat[0]
        raise ValueError(
            f"{what} holds {given} ({array.dtype}), which would be stored as {kept} ({dtype}): nothing was "
            f"added; give values that {dtype} holds, or a space whose dtype holds these"
        )
    return stored
