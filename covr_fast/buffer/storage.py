"""The buffer's memory: every tensor it owns, by name, and the C++ object that works on their addresses."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _C
from .spec import KeySpec, Shape

Columns = dict[str, tuple[Shape, torch.dtype]]


class Storage:
    """Rings of frames (one per environment and key) and rows of transitions, as named tensors.

    `capacity` transitions over `num_envs` streams; stream e has `limits[e]` of them in rows
    e * rows_per_stream + t % limits[e]. See csrc/replay.h for how they refer to frames.
    """

    def __init__(
        self, capacity: int, num_envs: int, keys: list[KeySpec], columns: Columns, n_step: int, gamma: float
    ) -> None:
        self.num_envs = num_envs
        self.keys = keys
        self.rows_per_stream = -(-capacity // num_envs)
        self.rows = num_envs * self.rows_per_stream
        self.limits = capacity // num_envs + (np.arange(num_envs) < capacity % num_envs).astype(np.int64)
        self.n_step = n_step
        self.tensors: dict[str, Tensor] = {
            name: torch.zeros(num_envs, dtype=torch.int64) for name in ("count", "first", "ended")
        }
        self.tensors["reward"] = torch.zeros(self.rows)
        self.tensors["flags"] = torch.zeros(self.rows, dtype=torch.uint8)
        self.tensors["time"] = torch.zeros(self.rows, dtype=torch.int32)
        for name, (shape, dtype) in columns.items():
            self.tensors[f"column.{name}"] = torch.zeros(self.rows, *shape, dtype=dtype)
        for key in keys:
            self.tensors[f"frames.{key.name}"] = _frame_ring(key, num_envs, self.rows_per_stream)
            self.tensors[f"written.{key.name}"] = torch.zeros(num_envs, dtype=torch.int64)
            self.tensors[f"newest.{key.name}"] = torch.zeros(self.rows, dtype=torch.int64)
            self.tensors[f"depth.{key.name}"] = torch.zeros(self.rows, dtype=torch.uint8)
        self.core = self._connect(capacity, columns, gamma)

    def _connect(self, capacity: int, columns: Columns, gamma: float) -> Any:
        address = {name: tensor.data_ptr() for name, tensor in self.tensors.items()}
        core = _C.Replay(
            capacity=capacity,
            num_envs=self.num_envs,
            n_step=self.n_step,
            gamma=gamma,
            **{name: address[name] for name in ("count", "first", "ended", "reward", "flags", "time")},
        )
        for key in self.keys:
            slots = self.tensors[f"frames.{key.name}"].shape[1]
            core.add_key(
                name=key.name,
                data=address[f"frames.{key.name}"],
                recent=address[f"frames.{key.name}"],
                slots=slots,
                recent_slots=slots,
                stack=key.stack,
                channels=key.channels,
                height=key.height,
                width=key.width,
                item_bytes=key.dtype.itemsize,
                channels_last=key.channels_last,
                **{name: address[f"{name}.{key.name}"] for name in ("written", "newest", "depth")},
            )
        for name, (shape, dtype) in columns.items():
            row_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            core.add_column(name, address[f"column.{name}"], row_bytes)
        return core

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def bounds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(first, ended, count) per stream."""
        first, ended, count = (self.tensors[name].numpy().copy() for name in ("first", "ended", "count"))
        return first, ended, count

    def ready(self) -> tuple[np.ndarray, np.ndarray]:
        """(first, ready) per stream: the transitions first .. ready - 1 have all their n steps."""
        first, ended, count = self.bounds()
        return first, np.maximum(np.maximum(first, ended), count - self.n_step + 1)

    def used(self) -> dict[str, Tensor]:
        """The tensors, the frame rings without the slots that no stream has reached yet."""
        used = dict(self.tensors)
        for key in self.keys:
            reached = int(self.tensors[f"written.{key.name}"].max())
            used[f"frames.{key.name}"] = self.tensors[f"frames.{key.name}"][:, :reached]
        return used


def _frame_ring(key: KeySpec, num_envs: int, rows_per_stream: int) -> Tensor:
    """An episode of n transitions has n + 1 frames: room for the extra ones of episodes from 32 steps on, and
    of any where 64 KiB per stream suffice; and the stack that the oldest transition needs."""
    spare = max(-(-rows_per_stream // 32), (64 << 10) // key.frame_bytes)
    slots = rows_per_stream + min(rows_per_stream, spare) + key.stack + 1
    frames = torch.empty(num_envs, slots, *key.frame_shape, dtype=key.dtype)
    _C.prefer_huge_pages(frames.data_ptr(), frames.nbytes)
    return frames
