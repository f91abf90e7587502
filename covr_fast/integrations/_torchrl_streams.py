"""Which of the buffer's streams the rows of a tensordict belong to."""

import math
import warnings
from collections import Counter
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor


class Streams:
    """Gives every trajectory one of `num_envs` streams, so that its steps follow each other in the buffer."""

    def __init__(self, num_envs: int) -> None:
        self._num_envs = num_envs
        self._stream_of: dict[int, int] = {}  # trajectories that have not ended
        self._last_used = np.zeros(num_envs, np.int64)
        self._clock = 0

    def of(self, tensordict: TensorDictBase, trajectories: Tensor | None, ends: np.ndarray) -> np.ndarray:
        """The stream of every row, int64 [N], in the order of the flattened tensordict. Its dimension named
        "time" is time; without one, the last of several.

        Args:
            trajectories: N integers, if known.
            ends: bool [N]: the row ends its trajectory.
        """
        shape, names = tensordict.shape, tensordict.names
        if trajectories is not None:
            given = trajectories.numpy().reshape(-1)
            if given.shape != ends.shape or given.dtype.kind not in "iu":
                raise ValueError(
                    f"('collector', 'traj_ids') are {given.size} values of {given.dtype} for {len(ends)} "
                    "rows: there must be one integer per row"
                )
            return np.array([self._stream(*row) for row in zip(given.tolist(), ends, strict=True)], np.int64)
        if len(shape) > 1:
            time = names.index("time") if "time" in names else len(shape) - 1
            others = (*shape[:time], 1, *shape[time + 1 :])
            environments = math.prod(others)
            if environments > self._num_envs:
                raise ValueError(
                    f"tensordict is of {environments} environments, num_envs is {self._num_envs}"
                )
            return np.broadcast_to(np.arange(environments).reshape(others), shape).reshape(-1)
        n = len(ends)
        if n == self._num_envs:
            return np.arange(n)
        if self._num_envs > 1 and n:
            warnings.warn(
                f"the tensordict [{n}] does not say which of the {self._num_envs} environments its rows are "
                "of: all go to the first stream, which stores capacity / num_envs transitions. Extend with "
                "[environments, time] or with ('collector', 'traj_ids'), or build the buffer with num_envs=1",
                stacklevel=3,
            )
        return np.zeros(n, np.int64)

    def _stream(self, trajectory: int, ends: bool) -> int:
        """A new trajectory gets the stream that was not used for the longest time, if possible one without a
        trajectory that has not ended."""
        if trajectory not in self._stream_of:
            busy = np.zeros(self._num_envs, bool)
            busy[list(self._stream_of.values())] = True
            stream = int(np.lexsort((self._last_used, busy))[0])
            self._stream_of = {t: s for t, s in self._stream_of.items() if s != stream}
            self._stream_of[trajectory] = stream
        stream = self._stream_of[trajectory]
        self._clock += 1
        self._last_used[stream] = self._clock
        if ends:
            del self._stream_of[trajectory]
        return stream

    def state_dict(self) -> dict[str, Any]:
        return {
            "of": dict(self._stream_of),
            "last_used": torch.from_numpy(self._last_used.copy()),
            "clock": self._clock,
        }

    @classmethod
    def from_state(cls, num_envs: int, state: dict[str, Any]) -> "Streams":
        """The inverse of `state_dict`."""
        streams = cls(num_envs)
        streams._stream_of = {int(trajectory): int(stream) for trajectory, stream in state["of"].items()}
        streams._last_used[:] = np.asarray(state["last_used"])
        streams._clock = int(state["clock"])
        return streams


def in_steps(streams: np.ndarray) -> list[np.ndarray]:
    """Groups of rows, each with at most one row per stream. The rows of a stream keep their order."""
    steps: list[list[int]] = []
    seen: Counter[int] = Counter()
    for row, stream in enumerate(streams.tolist()):
        if seen[stream] == len(steps):
            steps.append([])
        steps[seen[stream]].append(row)
        seen[stream] += 1
    return [np.array(step) for step in steps]
