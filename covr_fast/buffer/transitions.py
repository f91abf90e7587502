"""Stored transitions, read and corrected one by one."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from .. import _C
from .arguments import Rows, flags, ids, integers, shaped, some_extras
from .options import Options
from .output import Gather
from .storage import Storage

_TERMINATED, _TRUNCATED = np.uint8(1), np.uint8(2)  # flags of csrc/replay/replay.h
_END = _TERMINATED | _TRUNCATED  # not kCut, the flag of a stream that was cut


class StoredTransitions:
    """The part of `ReplayBuffer` that finds transitions by their id, or by their place in a stream.

    All of it answers from the host's tables. If rows of device memory were added, the host waits until they
    have arrived there, and raises what was found wrong with them (see `ReplayBuffer.add`).
    """

    def __init__(self, options: Options, storage: Storage, gather: Gather) -> None:
        self.num_envs = options.num_envs
        self._gather = gather
        self._options = options
        self._storage = storage

    @property
    def _core(self) -> _C.Replay:
        """The host's tables, when they have everything that was added."""
        self._gather.drain()
        return self._storage.core

    # ---- by id ----

    def contains(self, index: Rows) -> Tensor:
        """bool [n] on the CPU: which of these transitions are stored now."""
        with self._core.reading() as locked:
            return torch.from_numpy(locked.rows(ids(index).numpy())) >= 0

    def actions(self, index: Rows) -> Tensor:
        """The actions [n, *action_shape] of these transitions, on the CPU."""
        return self._columns(["action"], index)["action"]

    def extras(self, index: Rows) -> dict[str, Tensor]:
        """The extras, each [n, *shape], of these transitions, on the CPU."""
        return self._columns(self._options.extras, index)

    def _columns(self, names: Iterable[str], index: Rows) -> dict[str, Tensor]:
        at = ids(index)
        with self._core.reading() as locked:
            rows = stored_rows(locked, at)
            return {name: self._storage.tensors[f"column.{name}"][rows] for name in names}

    def set_extras(self, index: Rows, **values: Rows) -> None:
        """Overwrites extras of these transitions, e.g. with a prior that arrives after its step."""
        at = ids(index)
        checked = some_extras(values, len(at), self._options)
        with self._gather.changing() as changed, self._core.writing() as locked:
            rows = stored_rows(locked, at).numpy()
            for name, value in checked.items():
                self._storage.array(f"column.{name}")[rows] = value
            changed(rows, [f"column.{name}" for name in checked])

    def set_terminated(self, index: Rows, terminated: Rows) -> None:
        """Corrects which of these transitions [n] ended their episode: True terminates those that did not
        end, False takes back any end. What follows in the stream stays as it was added."""
        self._set_ends(index, terminated, "terminated")

    def set_truncated(self, index: Rows, truncated: Rows) -> None:
        """Corrects which of these transitions [n] were truncated: True truncates them, also those that
        terminated; False turns a truncation into a termination. Otherwise as `set_terminated`."""
        self._set_ends(index, truncated, "truncated")

    def _set_ends(self, index: Rows, given: Rows, what: str) -> None:
        at = ids(index)
        on = shaped(flags(given, what), (len(at),), what)
        stored = self._storage.array("flags")
        with self._gather.changing() as changed, self._core.writing() as locked:
            rows = stored_rows(locked, at).numpy()
            end = stored[rows] & _END
            if what == "terminated":
                end = np.where(on, np.where(end, end, _TERMINATED), 0)
            else:
                end = np.where(on, _TRUNCATED, np.where(end, _TERMINATED, 0))
            stored[rows] = end | stored[rows] & ~_END
            changed(rows, ["flags"])

    def windows(self, index: Rows, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(reward float32 [B, n], alive bool [B, n]): the n steps from each transition on, and which of them
        belong to its episode and were added already. Rewards of the others are zero."""
        at = ids(index)
        stream = at.numpy()[:, None] % self.num_envs
        t = at.numpy()[:, None] // self.num_envs + np.arange(n)
        with self._core.reading() as locked:
            stored_rows(locked, at)
            rows = self._storage.rows_of(stream, t)
            alive = t < self._storage.array("count")[stream]
            reward, ends = (self._storage.array(name)[rows] for name in ("reward", "flags"))
        alive[:, 1:] &= ~np.logical_or.accumulate(ends != 0, axis=1)[:, :-1]
        return np.where(alive, reward, np.float32(0)), alive

    # ---- by place ----

    def stream_bounds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(first, ended, count), each int64 [num_envs]: transitions first .. count - 1 of a stream are
        stored, and those before `ended` belong to episodes that have ended. Transition t of environment e has
        the id t * num_envs + e."""
        self._gather.drain()
        first, ended, count = (self._storage.array(name).copy() for name in ("first", "ended", "count"))
        return first, ended, count

    def stream_rows(self, env: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Transitions start .. stop - 1 of an environment, which must be stored: reward float32, end bool
        (the episode ended, or was cut, with this step), terminated bool and time int32 (steps since the
        episode began)."""
        self._gather.drain()
        rows = self._storage.rows_of(env, np.arange(start, stop))
        reward, ends, time = (self._storage.array(name)[rows] for name in ("reward", "flags", "time"))
        return {"reward": reward, "end": ends != 0, "terminated": (ends & _TERMINATED) != 0, "time": time}

    def span_rows(self, start: np.ndarray, stop: np.ndarray) -> dict[str, np.ndarray]:
        """Transitions start[e] .. stop[e] - 1 of every environment e, which must be stored, environment by
        environment: their ids int64, and otherwise as `stream_rows`."""
        stream, t = spans(start, stop)
        rows = self._storage.rows_of(stream, t)
        with self._core.reading():
            reward, ends, time = (self._storage.array(name)[rows] for name in ("reward", "flags", "time"))
        terminated = (ends & _TERMINATED) != 0
        ids = t * self.num_envs + stream
        return {"ids": ids, "reward": reward, "end": ends != 0, "terminated": terminated, "time": time}

    def start_at(self, t: Rows) -> None:
        """The first transition that is added of environment e will be number t[e], int64 [num_envs], of its
        stream instead of number 0. The buffer must be empty."""
        first = shaped(integers(t, "t"), (self.num_envs,), "t")
        if self.stream_bounds()[2].any() or (first < 0).any():
            raise ValueError("start_at() needs an empty buffer, and numbers of at least 0")
        with self._gather.changing():
            for name in ("count", "first", "ended"):
                self._storage.array(name)[:] = first

    def ids_at(self, env_ids: Rows, positions: Rows) -> np.ndarray:
        """int64 [n], the ids of the transitions at these positions of their environments' rings; -1 where
        none is stored. Transition t of environment e is at position t % m of a ring with m = capacity //
        num_envs places, one more for e < capacity % num_envs.

        Raises:
            IndexError: an environment or a position that does not exist.
        """
        envs, places = integers(env_ids, "env_ids"), integers(positions, "positions")
        shaped(places, envs.shape, "positions")
        m = self._storage.rows_per_stream
        for what, values, n in ("env_ids", envs, self.num_envs), ("positions", places, m):
            if ((values < 0) | (values >= n)).any():
                raise IndexError(f"{what} must lie in [0, {n})")
        with self._core.reading() as locked:
            return locked.ids_in_rows(envs * m + places)

    def ring(self, name: str) -> np.ndarray:
        """One value per place of the rings, [num_envs, m, ...], placed as in `ids_at`.

        "reward", "action" and the names of extras give the buffer's own memory: what is written into it is
        stored, unchecked. On a GPU, where batches are made from a copy of it, it is read-only. "terminated"
        and "truncated" give a bool copy; `set_terminated` and `set_truncated` change these. Places where
        nothing is stored have any value.
        """
        self._gather.drain()
        if name in ("terminated", "truncated"):
            flag = _TERMINATED if name == "terminated" else _TRUNCATED
            values = (self._storage.array("flags") & flag) != 0
        else:
            values = self._storage.array("reward" if name == "reward" else f"column.{name}")
        ring: np.ndarray = values.reshape(self.num_envs, -1, *values.shape[1:])
        if self._gather.device.type != "cpu":
            ring.flags.writeable = False
        return ring


def spans(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(e, t), each int64 [M]: the numbers start[e] .. stop[e] - 1 of every e, one e after another."""
    length = stop - start
    begin = np.cumsum(length) - length  # where each e's part begins
    numbers = np.arange(length.sum()) + np.repeat(start - begin, length)
    return np.repeat(np.arange(len(length)), length), numbers


def stored_rows(locked: _C.Lock, at: Tensor) -> Tensor:
    """The rows of the transitions with ids `at`, while the core is locked by `reading()` or `writing()`.
    Raises IndexError if one is not stored."""
    rows = torch.from_numpy(locked.rows(at.numpy()))
    if (rows < 0).any():
        gone = at[rows < 0]
        raise IndexError(
            f"{len(gone)} of {len(at)} transitions, first {int(gone[0])}, are not in the buffer: they "
            "were overwritten or never added (contains() tells which are in it)"
        )
    return rows
