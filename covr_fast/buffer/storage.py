"""The buffer's memory: every tensor it owns, by name, and the C++ object that works on them.

What C++ reads or writes is made with a dtype and a device here and in the other files of the buffer: torch's
defaults are the process's, and other libraries change them while they work.
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _C
from .options import KeySpec, Options
from .pinned import pinned_empty

# The memory of the C++ object: one entry per stream, or one per row of transitions.
_OF_STREAMS = ("count", "first", "ended")
_OF_ROWS = {"reward": torch.float32, "flags": torch.uint8, "time": torch.int32}
_OF_ROWS_AND_KEY = {"newest": torch.int64, "depth": torch.uint8}


class Storage:
    """Rings of frames (one per environment and key) and rows of transitions, as named tensors. Those with one
    entry per stream are the rows of `streams`: count, first, ended and, of each key, written.

    `capacity` transitions over `num_envs` streams; stream e has `limits[e]` of them in rows
    e * rows_per_stream + t % limits[e]. See csrc/replay/replay.h for how they refer to frames.
    """

    def __init__(self, options: Options, device: torch.device, pinned: bool) -> None:
        capacity, num_envs = options.capacity, options.num_envs
        self.num_envs = num_envs
        self.keys = options.keys
        self.rows_per_stream = -(-capacity // num_envs)
        self.rows = num_envs * self.rows_per_stream
        self.limits = capacity // num_envs + (np.arange(num_envs) < capacity % num_envs).astype(np.int64)
        rings = _frame_rings(options, self.rows_per_stream, device, pinned)
        self.frame_bytes = sum(ring.nbytes for ring in rings)
        self.streams = torch.zeros(len(_OF_STREAMS) + len(rings), num_envs, dtype=torch.int64, device="cpu")
        self.tensors: dict[str, Tensor] = {
            **dict(zip(_OF_STREAMS, self.streams, strict=False)),
            **{name: torch.zeros(self.rows, dtype=dtype, device="cpu") for name, dtype in _OF_ROWS.items()},
        }
        for column in options.columns:
            values = torch.zeros((self.rows, *column.shape), dtype=column.dtype, device="cpu")
            self.tensors[f"column.{column.name}"] = values
        self._recent: dict[str, Tensor] = {}  # copies of the latest frames, which the CPU compares with
        written = self.streams[len(_OF_STREAMS) :]
        for key, frames, of_key in zip(self.keys, rings, written, strict=True):
            self.tensors[f"frames.{key.name}"] = frames
            if frames.is_cuda:
                shape = (num_envs, key.stack + 1, *key.frame_shape)
                self._recent[key.name] = pinned_empty(shape, key.dtype, device)
            self.tensors[f"written.{key.name}"] = of_key
            for name, dtype in _OF_ROWS_AND_KEY.items():
                self.tensors[f"{name}.{key.name}"] = torch.zeros(self.rows, dtype=dtype, device="cpu")
        for tensor in self.tensors.values():
            if tensor.is_cpu and not tensor.is_pinned():
                # Before anything is written: random rows of large buffers are bound by address translation.
                _C.prefer_huge_pages(tensor)
        self.core = self._connect(options)

    def _connect(self, options: Options) -> _C.Replay:
        core = _C.Replay(
            capacity=options.capacity,
            num_envs=options.num_envs,
            n_step=options.n_step,
            gamma=options.gamma,
            **{name: self.tensors[name] for name in (*_OF_STREAMS, *_OF_ROWS)},
        )
        for key in self.keys:
            frames = self.tensors[f"frames.{key.name}"]
            core.add_key(
                name=key.name,
                frames=frames,
                recent=self._recent.get(key.name, frames),
                stack=key.stack,
                channels=key.channels,
                height=key.height,
                width=key.width,
                channels_last=key.channels_last,
                **{name: self.tensors[f"{name}.{key.name}"] for name in ("written", *_OF_ROWS_AND_KEY)},
            )
        for column in options.columns:
            core.add_column(column.name, self.tensors[f"column.{column.name}"])
        core.cut_at_jumps = options.on_jump == "cut"
        return core

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.tensors.values(), *self._recent.values()))

    def array(self, name: str) -> np.ndarray:
        values: np.ndarray = self.tensors[name].numpy()
        return values

    def rows_of(self, stream: Any, t: np.ndarray) -> np.ndarray:
        rows: np.ndarray = stream * self.rows_per_stream + t % self.limits[stream]
        return rows

    # ---- frames ----

    def newest_frames(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Per key, (ring, streams [n], slots [n]): the newest frame of each row is ring[streams, slots]."""
        for key in self.keys:
            ring = self.tensors[f"frames.{key.name}"]
            slots = self.tensors[f"newest.{key.name}"][rows] % ring.shape[1]
            yield ring, rows // self.rows_per_stream, slots

    def restore_recent(self) -> None:
        """After frames were loaded: copies the latest of every stream to where the CPU compares them."""
        for name, recent in self._recent.items():
            frames = _as_bytes(self.tensors[f"frames.{name}"])
            latest = self.tensors[f"written.{name}"][:, None] - torch.arange(
                1, recent.shape[1] + 1, dtype=torch.int64, device="cpu"
            )
            env, place = torch.nonzero(latest >= 0, as_tuple=True)
            number = latest[env, place]
            found = frames[env.to(frames.device), (number % frames.shape[1]).to(frames.device)]
            _as_bytes(recent)[env, number % recent.shape[1]] = found.cpu()

    # ---- saving ----

    def used(self) -> dict[str, Tensor]:
        """The tensors; of the frame rings, only the slots that a stream has reached."""
        used = dict(self.tensors)
        for key in self.keys:
            reached = int(self.tensors[f"written.{key.name}"].max())
            used[f"frames.{key.name}"] = self.tensors[f"frames.{key.name}"][:, :reached]
        return used

    def parts_for(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """The parts of the tensors into which a state, whose tensors have these shapes, is to be copied."""
        return {
            name: tensor[:, : shapes[name][1]] if name.startswith("frames.") else tensor
            for name, tensor in self.tensors.items()
        }


def _as_bytes(ring: Tensor) -> Tensor:
    """Frames [num_envs, slots, ...] as uint8 [num_envs, slots, bytes]: torch cannot index all dtypes."""
    return ring.view(*ring.shape[:2], -1).view(torch.uint8)


def size_text(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def ring_shapes(keys: Sequence[KeySpec], num_envs: int, rows_per_stream: int) -> list[tuple[int, ...]]:
    """Shape of each key's frames: [num_envs, slots, *frame_shape]."""
    # An episode of n transitions has n + 1 frames. There is room for the extra frames of episodes of at least
    # 32 steps (of all, if 64 KiB per stream are enough), and for the stack of the oldest transition.
    shapes = []
    for key in keys:
        spare = max(-(-rows_per_stream // 32), (64 << 10) // key.frame_bytes)
        slots = rows_per_stream + min(rows_per_stream, spare) + key.stack + 1
        shapes.append((num_envs, slots, *key.frame_shape))
    return shapes


def _frame_rings(options: Options, rows_per_stream: int, device: torch.device, pinned: bool) -> list[Tensor]:
    """One per key: [num_envs, slots, *frame_shape].

    Raises:
        MemoryError: the frames cannot fit. The system gives host memory only as it is written, so a buffer
            that may never be full causes a warning instead.
    """
    shapes = ring_shapes(options.keys, options.num_envs, rows_per_stream)
    nbytes = sum(
        math.prod(shape) * key.dtype.itemsize for key, shape in zip(options.keys, shapes, strict=True)
    )
    short = _shortage(nbytes, options.capacity, device, pinned)
    if short and device.type == "cuda":
        raise MemoryError(short)
    try:
        rings = [
            pinned_empty(shape, key.dtype, device)
            if pinned
            else torch.empty(shape, dtype=key.dtype, device=device)
            for key, shape in zip(options.keys, shapes, strict=True)
        ]
    except (RuntimeError, MemoryError) as error:
        if short is None:
            raise
        raise MemoryError(short) from error
    if short:
        warnings.warn(short, stacklevel=4)
    return rings


def _shortage(nbytes: int, capacity: int, device: torch.device, pinned: bool) -> str | None:
    """None if the frames of `capacity` transitions, nbytes in all, fit in memory; else what would fit."""
    on_gpu = device.type == "cuda" and not pinned
    memory = _gpu_memory(device) if on_gpu else _host_memory()
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


def _gpu_memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes. What torch keeps of tensors that are gone, such as an earlier buffer, is free."""
    free, total = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + kept, total


def _host_memory() -> tuple[int, int] | None:
    """(free, total) bytes; None where there is no /proc."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    kilobytes = dict(re.findall(r"(\w+): +(\d+) kB", meminfo.read_text()))
    return int(kilobytes["MemAvailable"]) << 10, int(kilobytes["MemTotal"]) << 10
