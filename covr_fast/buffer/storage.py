"""The buffer's memory: every tensor it owns, by name, and the C++ object that works on them.

What C++ reads or writes is made with a dtype and a device here and in the other files of the buffer: torch's
defaults are the process's, and other libraries change them while they work.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _C
from .observation import KeySpec, Shape
from .options import Options

_TERMINATED, _TRUNCATED = np.uint8(1), np.uint8(2)  # flags of csrc/replay/replay.h
_END = _TERMINATED | _TRUNCATED  # not kCut, the flag of a stream that was cut

# The memory of the C++ object: one entry per stream, or one per row of transitions.
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
    e * rows_per_stream + t % limits[e]. See csrc/replay/replay.h for how they refer to frames. Methods with
    the name of one of ReplayBuffer do what that one documents.
    """

    def __init__(self, options: Options, device: torch.device, pinned: bool) -> None:
        capacity, num_envs, keys = options.capacity, options.num_envs, options.keys
        self.num_envs = num_envs
        self.keys = keys
        self.rows_per_stream = -(-capacity // num_envs)
        self.rows = num_envs * self.rows_per_stream
        self.limits = capacity // num_envs + (np.arange(num_envs) < capacity % num_envs).astype(np.int64)
        shapes = [_ring_shape(key, num_envs, self.rows_per_stream) for key in keys]
        rings = _frame_rings(keys, shapes, capacity, device, pinned)
        self.frame_bytes = sum(ring.nbytes for ring in rings)
        sizes = {"streams": num_envs, "rows": self.rows}
        self.tensors: dict[str, Tensor] = {
            name: torch.zeros(sizes[size], dtype=dtype, device="cpu") for name, (size, dtype) in _CORE.items()
        }
        for column in options.columns:
            self.tensors[f"column.{column.name}"] = torch.zeros(
                (self.rows, *column.shape), dtype=column.dtype, device="cpu"
            )
        self._recent: dict[str, Tensor] = {}  # copies of the latest frames, which the CPU compares with
        for key, frames in zip(keys, rings, strict=True):
            self.tensors[f"frames.{key.name}"] = frames
            if frames.is_cuda:
                shape = (num_envs, key.stack + 1, *key.frame_shape)
                self._recent[key.name] = torch.empty(shape, dtype=key.dtype, device="cpu", pin_memory=True)
            for name, (size, dtype) in _OF_KEY.items():
                self.tensors[f"{name}.{key.name}"] = torch.zeros(sizes[size], dtype=dtype, device="cpu")
        for tensor in self.tensors.values():
            if tensor.device.type == "cpu" and not tensor.is_pinned():
                # Before anything is written: random rows of large buffers are bound by address translation.
                _C.prefer_huge_pages(tensor)
        self.core = self._connect(options)

    def _connect(self, options: Options) -> _C.Replay:
        core = _C.Replay(
            capacity=options.capacity,
            num_envs=options.num_envs,
            n_step=options.n_step,
            gamma=options.gamma,
            **{name: self.tensors[name] for name in _CORE},
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
                **{name: self.tensors[f"{name}.{key.name}"] for name in _OF_KEY},
            )
        for column in options.columns:
            core.add_column(column.name, self.tensors[f"column.{column.name}"])
        core.cut_at_jumps = options.on_jump == "cut"
        return core

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.tensors.values(), *self._recent.values()))

    # ---- streams ----

    def stream_bounds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        first, ended, count = (self.tensors[name].numpy().copy() for name in ("first", "ended", "count"))
        return first, ended, count

    def start_at(self, t: np.ndarray) -> None:
        for name in ("count", "first", "ended"):
            self.tensors[name].copy_(torch.from_numpy(t))

    def stream_rows(self, env: int, start: int, stop: int) -> dict[str, np.ndarray]:
        rows = self._rows_of(env, np.arange(start, stop))
        flags = self.tensors["flags"].numpy()[rows]
        return {
            "reward": self.tensors["reward"].numpy()[rows],
            "end": flags != 0,
            "terminated": (flags & _TERMINATED) != 0,
            "time": self.tensors["time"].numpy()[rows],
        }

    def windows(self, at: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        stream, t = at % self.num_envs, at // self.num_envs
        reward = np.zeros((len(at), n), np.float32)
        alive = np.zeros((len(at), n), bool)
        still = np.ones(len(at), bool)
        with self.core.reading() as locked:
            stored_rows(locked, torch.from_numpy(at))
            count = self.tensors["count"].numpy()[stream]
            for k in range(n):
                still = still & (t + k < count)
                rows = self._rows_of(stream, t + k)
                alive[:, k] = still
                reward[:, k] = np.where(still, self.tensors["reward"].numpy()[rows], 0)
                still = still & (self.tensors["flags"].numpy()[rows] == 0)
        return reward, alive

    def _rows_of(self, stream: Any, t: np.ndarray) -> np.ndarray:
        rows: np.ndarray = stream * self.rows_per_stream + t % self.limits[stream]
        return rows

    # ---- single columns ----

    def columns(self, names: Iterable[str], at: Tensor) -> list[Tensor]:
        """These columns of the transitions with ids `at`, each [n, *shape]."""
        with self.core.reading() as locked:
            rows = stored_rows(locked, at)
            return [self.tensors[f"column.{name}"][rows] for name in names]

    def set_columns(self, at: Tensor, values: Mapping[str, np.ndarray]) -> None:
        with self.core.writing() as locked:
            rows = stored_rows(locked, at).numpy()
            for name, value in values.items():
                self.tensors[f"column.{name}"].numpy()[rows] = value

    def set_terminated(self, at: Tensor, terminated: np.ndarray) -> None:
        self._set_ends(at, lambda end: np.where(terminated, np.where(end, end, _TERMINATED), 0))

    def set_truncated(self, at: Tensor, truncated: np.ndarray) -> None:
        self._set_ends(at, lambda end: np.where(truncated, _TRUNCATED, np.where(end, _TERMINATED, 0)))

    def _set_ends(self, at: Tensor, change: Callable[[np.ndarray], np.ndarray]) -> None:
        """Replaces the flags of _END by what `change` makes of them."""
        flags = self.tensors["flags"].numpy()
        with self.core.writing() as locked:
            rows = stored_rows(locked, at).numpy()
            flags[rows] = change(flags[rows] & _END) | flags[rows] & ~_END

    def ring(self, name: str) -> np.ndarray:
        flag = {"terminated": _TERMINATED, "truncated": _TRUNCATED}.get(name)
        if flag is not None:
            tensor = (self.tensors["flags"] & int(flag)) != 0
        else:
            tensor = self.tensors["reward" if name == "reward" else f"column.{name}"]
        return tensor.view(self.num_envs, self.rows_per_stream, *tensor.shape[1:]).numpy()

    def ids_at(self, streams: np.ndarray, positions: np.ndarray) -> np.ndarray:
        ids: np.ndarray = self.core.ids_in_rows(streams * self.rows_per_stream + positions)
        return ids

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
            frames, written = self.tensors[f"frames.{name}"], self.tensors[f"written.{name}"]
            for env, count in enumerate(written.tolist()):
                for number in range(max(0, count - recent.shape[1]), count):
                    recent[env, number % recent.shape[1]].copy_(frames[env, number % frames.shape[1]])

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


def stored_rows(locked: _C.Lock, at: Tensor) -> Tensor:
    """The rows of the transitions with ids `at`, while the core is locked by `reading()` or `writing()`.

    Raises:
        IndexError: a transition is not stored.
    """
    rows = torch.from_numpy(locked.rows(at.numpy()))
    if (rows < 0).any():
        gone = at[rows < 0]
        raise IndexError(
            f"{len(gone)} of {len(at)} transitions, first {int(gone[0])}, are not in the buffer: they "
            "were overwritten or never added (contains() tells which are in it)"
        )
    return rows


def size_text(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def shortage(nbytes: int, capacity: int, device: torch.device, pinned: bool) -> str | None:
    """None if the frames of `capacity` transitions, nbytes in all, fit in memory; else what would fit."""
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
    """An episode of n transitions has n + 1 frames. There is room for the extra frames of episodes of at
    least 32 steps (of all, if 64 KiB per stream are enough), and for the stack of the oldest transition."""
    spare = max(-(-rows_per_stream // 32), (64 << 10) // key.frame_bytes)
    slots = rows_per_stream + min(rows_per_stream, spare) + key.stack + 1
    return (num_envs, slots, *key.frame_shape)


def _frame_rings(
    keys: Sequence[KeySpec],
    shapes: list[Shape],
    capacity: int,
    device: torch.device,
    pinned: bool,
) -> list[Tensor]:
    """Raises MemoryError if the frames cannot fit. The system gives host memory only as it is written, so a
    buffer that may never be full causes a warning instead."""
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
