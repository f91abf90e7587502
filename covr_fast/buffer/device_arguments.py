"""What `add` is given in device memory, checked as far as the host can without waiting for the device.

The kernels of csrc/replay/device_add.h check values: NaN, infinity and `env_ids`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from ..streams import send
from .arguments import (
    FLAG,
    ID,
    REWARD,
    ObservationRows,
    Rows,
    as_column,
    by_column,
    by_key,
    check_gpu,
    flags,
    imported,
    integers,
    or_declare,
)
from .options import ColumnSpec, KeySpec, Options, Spec

_DLPACK_CUDA = 2


class DeviceRows(NamedTuple):
    """The rows of one call, all contiguous and on one device, in the dtypes in which they are stored."""

    obs: list[Tensor]
    next_obs: list[Tensor]
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    columns: list[Tensor]
    env_ids: Tensor | None


def lie_on_gpu(obs: ObservationRows, options: Options) -> bool:
    """Whether observations, or the first of a dict of them, are in the memory of a GPU, and kernels can add
    them: there is a limit to observation keys and columns."""
    first: Any = next(iter(obs.values()), None) if isinstance(obs, Mapping) else obs
    if isinstance(first, Tensor):
        on_gpu = first.is_cuda
    else:
        on_gpu = hasattr(first, "__dlpack_device__") and first.__dlpack_device__()[0] == _DLPACK_CUDA
    limits = _C.CudaAdd.max_keys, _C.CudaAdd.max_columns
    return on_gpu and len(options.keys) <= limits[0] and len(options.columns) <= limits[1]


def device_rows(
    obs: ObservationRows,
    action: Rows,
    reward: Rows,
    next_obs: ObservationRows,
    terminated: Rows,
    truncated: Rows,
    env_ids: Rows | None,
    extras: Mapping[str, Rows],
    options: Options,
    device: torch.device,
) -> DeviceRows:
    """Rows of which the observations are on the device. What else is in host memory is copied there.

    Raises:
        ValueError: a tensor is on another GPU, or has another shape or dtype.
    """
    rewards = _column(reward, REWARD, "reward", device)
    if rewards.ndim != 1:
        raise ValueError("reward must have one dimension, [rows]")
    n = len(rewards)
    if env_ids is None and n != options.num_envs:
        raise ValueError(
            f"reward has {n} rows for {options.num_envs} environments: pass env_ids to add rows of some of "
            "them"
        )
    return DeviceRows(
        _observation(obs, n, options, "obs", device),
        _observation(next_obs, n, options, "next_obs", device),
        rewards,
        _rows(_column(terminated, FLAG, "terminated", device), n, FLAG, "terminated"),
        _rows(_column(truncated, FLAG, "truncated", device), n, FLAG, "truncated"),
        [
            _rows(_column(value, spec, name, device), n, spec, name)
            for value, spec, name in by_column(action, extras, options)
        ],
        None if env_ids is None else _rows(_column(env_ids, ID, "env_ids", device), n, ID, "env_ids"),
    )


def _observation(
    value: ObservationRows, n: int, options: Options, what: str, device: torch.device
) -> list[Tensor]:
    return [
        _rows(_column(rows, key, name, device), n, key, name)
        for rows, key, name in by_key(value, options, what)
    ]


def _column(value: Rows, spec: Spec, what: str, device: torch.device) -> Tensor:
    """A contiguous tensor of the dtype in which it is stored, on the device."""
    found = imported(value, what)
    if not isinstance(found, Tensor) or found.device.type == "cpu":
        if spec is FLAG:
            on_host = flags(found, what)
        else:
            on_host = integers(found, what) if spec is ID else as_column(found, spec, what)
        return send(torch.from_numpy(on_host), device)
    check_gpu(found, device, what)
    found = found.detach()
    if found.dtype != spec.dtype:
        found = _rounded(found, spec, what)
    return found.contiguous()


def _rounded(given: Tensor, spec: Spec, what: str) -> Tensor:
    """In the spec's dtype. Floats beyond its range become NaN, which a kernel reports."""
    whole = spec is ID and not given.dtype.is_floating_point and given.dtype != torch.bool
    if whole:
        return given.to(spec.dtype)
    if not (given.dtype.is_floating_point and spec.dtype.is_floating_point):
        raise ValueError(
            f"{what} has dtype {str(given.dtype)[6:]}: on {given.device} it must be {str(spec.dtype)[6:]}; "
            f"cast it{or_declare(spec)}"
        )
    rounded = given.to(spec.dtype)
    if torch.finfo(given.dtype).max <= torch.finfo(spec.dtype).max:
        return rounded
    return rounded.masked_fill_(rounded.isinf() & ~given.isinf(), torch.nan)


def _rows(found: Tensor, n: int, spec: KeySpec | ColumnSpec, what: str) -> Tensor:
    """The tensor, if it has n rows of the spec's shape."""
    if found.shape != (n, *spec.shape):
        raise ValueError(f"{what} has shape {tuple(found.shape)}: it must be {(n, *spec.shape)}")
    return found
