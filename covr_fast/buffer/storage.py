"""The buffer's memory: every tensor it owns, by name, and the C++ object that works on their addresses."""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _C
from ..border import CPU, address
from .observation import KeySpec, Shape

Columns = dict[str, tuple[Shape, torch.dtype]]

# What the C++ object takes its memory for: one entry per stream, or one per row of transitions.
_CORE = {
    "count": ("streams", torch.int64),
    "first": ("streams", torch.int64),
    "ended": ("streams", torch.int64),
    "reward": ("rows", torch.float32),
    "flags": ("rows", torch.uint8),
    "time": ("rows", torch.int32),
}
_OF_KEY = {
    "written": ("streams", torch.int64),
    "newest": ("rows", torch.int64),
    "depth": ("rows", torch.uint8),
}


class Storage:
    """Rings of frames (one per environment and key) and rows of transitions, as named tensors.

    `capacity` transitions over `num_envs` streams; stream e has `limits[e]` of them in rows
    e * rows_per_stream + t % limits[e]. See csrc/replay.h for how they refer to frames.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        keys: list[KeySpec],
        columns: Columns,
        n_step: int,
        gamma: float,
        device: torch.device,
        pinned: bool,
    ) -> None:
        self.num_envs = num_envs
        self.keys = keys
        self.rows_per_stream = -(-capacity // num_envs)
        self.rows = num_envs * self.rows_per_stream
        self.limits = capacity // num_envs + (np.arange(num_envs) < capacity % num_envs).astype(np.int64)
        self.n_step = n_step
        shapes = [_ring_shape(key, num_envs, self.rows_per_stream) for key in keys]
        rings = _frame_rings(keys, shapes, capacity, device, pinned)
        self.frame_bytes = sum(ring.nbytes for ring in rings)
        sizes = {"streams": num_envs, "rows": self.rows}
        self.tensors: dict[str, Tensor] = {
            name: torch.zeros(sizes[size], dtype=dtype, device=CPU) for name, (size, dtype) in _CORE.items()
        }
        for name, (shape, dtype) in columns.items():
            self.tensors[f"column.{name}"] = torch.zeros((self.rows, *shape), dtype=dtype, device=CPU)
        self._recent: dict[str, Tensor] = {}  # the latest frames again, where the CPU can compare with them
        for key, frames in zip(keys, rings, strict=True):
            self.tensors[f"frames.{key.name}"] = frames
            if frames.is_cuda:
                shape = (num_envs, key.stack + 1, *key.frame_shape)
                self._recent[key.name] = torch.empty(shape, dtype=key.dtype, device=CPU, pin_memory=True)
            for name, (size, dtype) in _OF_KEY.items():
                self.tensors[f"{name}.{key.name}"] = torch.zeros(sizes[size], dtype=dtype, device=CPU)
        for tensor in self.tensors.values():
            if tensor.device.type == "cpu" and not tensor.is_pinned():
                # Before anything is written: random rows of large buffers are bound by address translation.
                _C.prefer_huge_pages(address(tensor, tensor.dtype), tensor.nbytes)
        self.core = self._connect(capacity, columns, gamma)

    def _connect(self, capacity: int, columns: Columns, gamma: float) -> Any:
        core = _C.Replay(
            capacity=capacity,
            num_envs=self.num_envs,
            n_step=self.n_step,
            gamma=gamma,
            **{name: address(self.tensors[name], dtype) for name, (_, dtype) in _CORE.items()},
        )
        for key in self.keys:
            frames = self.tensors[f"frames.{key.name}"]
            recent = self._recent.get(key.name, frames)
            core.add_key(
                name=key.name,
                data=address(frames, key.dtype, frames.device),
                recent=address(recent, key.dtype),
                slots=frames.shape[1],
                recent_slots=recent.shape[1],
                stack=key.stack,
                channels=key.channels,
                height=key.height,
                width=key.width,
                item_bytes=key.dtype.itemsize,
                floating=key.dtype.is_floating_point,
                channels_last=key.channels_last,
                **{
                    name: address(self.tensors[f"{name}.{key.name}"], dtype)
                    for name, (_, dtype) in _OF_KEY.items()
                },
            )
        for name, (shape, dtype) in columns.items():
            core.add_column(name, address(self.tensors[f"column.{name}"], dtype), shape, dtype.itemsize)
        return core

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.tensors.values(), *self._recent.values()))

    def bounds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(first, ended, count) per stream."""
        first, ended, count = (self.tensors[name].numpy().copy() for name in ("first", "ended", "count"))
        return first, ended, count

    def start_at(self, t: np.ndarray) -> None:
        """Of an empty buffer: the first transition of stream e, int64 [num_envs], will be number t[e]."""
        for name in ("count", "first", "ended"):
            self.tensors[name].copy_(torch.from_numpy(t))

    def ring(self, name: str) -> np.ndarray:
        """The memory of a tensor of rows, as [num_envs, rows_per_stream, ...]."""
        rows = self.tensors[name].numpy()
        return rows.reshape(self.num_envs, self.rows_per_stream, *rows.shape[1:])

    def restore_recent(self) -> None:
        """After the frames were loaded: copies the latest of every stream back to where the CPU compares."""
        for name, recent in self._recent.items():
            frames, written = self.tensors[f"frames.{name}"], self.tensors[f"written.{name}"]
            for env, count in enumerate(written.tolist()):
                for number in range(max(0, count - recent.shape[1]), count):
                    recent[env, number % recent.shape[1]].copy_(frames[env, number % frames.shape[1]])

    def used(self) -> dict[str, Tensor]:
        """The tensors, the frame rings without the slots that no stream has reached yet."""
        used = dict(self.tensors)
        for key in self.keys:
            reached = int(self.tensors[f"written.{key.name}"].max())
            used[f"frames.{key.name}"] = self.tensors[f"frames.{key.name}"][:, :reached]
        return used


def size_text(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def shortage(nbytes: int, capacity: int, device: torch.device, pinned: bool) -> str | None:
    """What would fit where the frames of `capacity` transitions, nbytes in all, do not; None if they do."""
    on_gpu = device.type == "cuda" and not pinned
    memory = torch.cuda.mem_get_info(device) if on_gpu else _host_memory()
    if memory is None or nbytes <= memory[0]:
        return None
    free, total = memory
    where = device if on_gpu else "the host"
    remedy = ", or keep frames in host memory with storage='pinned'" if on_gpu else ""
    return (
        f"the frames of capacity={capacity} transitions take {size_text(nbytes)}, {where} has "
        f"{size_text(free)} of {size_text(total)} free: lower the capacity to about "
        f"{int(capacity * free / nbytes)}{remedy}"
    )


def _host_memory() -> tuple[int, int] | None:
    """(free, total) bytes; None where there is no /proc."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
    return kilobytes["MemAvailable"] << 10, kilobytes["MemTotal"] << 10


def _ring_shape(key: KeySpec, num_envs: int, rows_per_stream: int) -> Shape:
    """An episode of n transitions has n + 1 frames: room for the extra ones of episodes from 32 steps on, and
    of any where 64 KiB per stream suffice; and the stack that the oldest transition needs."""
    spare = max(-(-rows_per_stream // 32), (64 << 10) // key.frame_bytes)
    slots = rows_per_stream + min(rows_per_stream, spare) + key.stack + 1
    return (num_envs, slots, *key.frame_shape)


def _frame_rings(
    keys: list[KeySpec],
    shapes: list[Shape],
    capacity: int,
    device: torch.device,
    pinned: bool,
) -> list[Tensor]:
    """Raises MemoryError where the frames cannot fit. The host's memory is taken as it is used, so a buffer
    that may never be full only warns."""
    nbytes = sum(math.prod(shape) * key.dtype.itemsize for key, shape in zip(keys, shapes, strict=True))
    short = shortage(nbytes, capacity, device, pinned)
    if short and device.type == "cuda":
        raise MemoryError(short)
    try:
        rings = [
            torch.empty(shape, dtype=key.dtype, device="cpu" if pinned else device, pin_memory=pinned)
            for key, shape in zip(keys, shapes, strict=True)
        ]
    except RuntimeError as error:
        if short is None:
            raise
        raise MemoryError(short) from error
    if short:
        warnings.warn(short, stacklevel=4)
    return rings
