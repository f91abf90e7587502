"""`FastReplayBuffer` for TorchRL: `extend(tensordict)`, `sample() -> TensorDict`."""

from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from covr_fast.buffer import ReplayBuffer
from covr_fast.buffer.samplers import Prioritized, Sampler, as_sampler

Key = tuple[str, ...]
_REWARD, _TERMINATED, _TRUNCATED, _DONE = (
    ("next", key) for key in ("reward", "terminated", "truncated", "done")
)
_TRAJECTORY = ("collector", "traj_ids")


class FastReplayBuffer:
    """The part of TensorDictReplayBuffer that training uses, with every frame stored once.

    What `extend` gets comes back from `sample`: observations (stacked ones cost one frame each), actions, and
    ("next", ...) with reward, done, terminated and truncated; every other root entry that the first `extend`
    has is stored as it is, other ("next", ...) entries are dropped. "index" and, with a prioritized sampler,
    "priority_weight" are added, with n_step > 1 also "steps_to_next_obs", which TorchRL's losses understand.

    A tensordict may be [environments, time], as collectors give it, or flat. In a flat one, rows belong
    together that have the same ("collector", "traj_ids"); without those, num_envs rows are one step of every
    environment, and any other number is one stretch of time after another. Where a row does not continue its
    environment's stream, a new segment begins: whatever the order, rows come back right, but frames of
    consecutive steps are shared only where the order shows that they are consecutive.

    Args:
        capacity, num_envs, frame_stack, n_step, gamma, sampler, seed: as in covr_fast.ReplayBuffer.
        obs_keys: the observations' keys. frame_stack means those with three dimensions.
        batch_size: of `sample`, unless given there.
        priority_key: where `update_tensordict_priority` finds priorities, [B] or [B, 1].
        device: where samples go; frames are kept in host memory.
        pixels_dtype: dtype of sampled images: uint8 as stored; a float dtype divides by 255.
    """

    def __init__(
        self,
        capacity: int,
        *,
        num_envs: int = 1,
        frame_stack: int = 1,
        n_step: int = 1,
        gamma: float = 0.99,
        sampler: Sampler = "uniform",
        obs_keys: tuple[str, ...] = ("pixels",),
        batch_size: int | None = None,
        priority_key: str = "td_error",
        device: torch.device | str = "cpu",
        pixels_dtype: torch.dtype = torch.uint8,
        seed: int | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.priority_key = priority_key
        self.device = torch.device(device)
        self.pixels_dtype = pixels_dtype
        self._obs_keys = obs_keys
        self._options: dict[str, Any] = {
            "capacity": capacity,
            "num_envs": num_envs,
            "frame_stack": frame_stack,
            "n_step": n_step,
            "gamma": gamma,
            "sampler": as_sampler(sampler),
            "seed": seed,
        }
        self._num_envs = num_envs
        self._buffer: ReplayBuffer | None = None
        self._extras: list[Key] = []
        self._stream_of: dict[int, int] = {}  # trajectories that have not ended
        self._last_used = np.zeros(num_envs, np.int64)
        self._clock = 0

    @property
    def buffer(self) -> ReplayBuffer:
        """The covr_fast.ReplayBuffer that holds the transitions, once there are any."""
        if self._buffer is None:
            raise IndexError("the buffer is empty: extend() it first")
        return self._buffer

    def __len__(self) -> int:
        return 0 if self._buffer is None else len(self._buffer)

    # ---- adding ----

    def extend(self, tensordict: TensorDictBase) -> Tensor:
        """Stores [N] or [E, T] transitions; int64 [N] or [E * T], their ids."""
        flat = tensordict.reshape(-1).detach().cpu()
        done = flat[_DONE].reshape(-1).numpy()
        streams = self._streams(tensordict, flat, done)
        if self._buffer is None:
            self._buffer = self._build(flat)
        columns = {_column(key): flat[key].numpy() for key in self._extras}
        terminated = _flag(flat, _TERMINATED, done)
        rows: dict[str, Any] = {
            "obs": {key: flat[key].numpy() for key in self._obs_keys},
            "next_obs": {key: flat["next", key].numpy() for key in self._obs_keys},
            "action": flat["action"].numpy(),
            "reward": flat[_REWARD].reshape(-1).numpy(),
            "terminated": terminated,
            "truncated": _flag(flat, _TRUNCATED, done & ~terminated) | (done & ~terminated),
        }
        index = np.empty(len(done), np.int64)
        for step in _steps(streams):
            picked: dict[str, Any] = {
                name: {key: part[step] for key, part in value.items()}
                if isinstance(value, dict)
                else value[step]
                for name, value in rows.items()
            }
            extras = {name: column[step] for name, column in columns.items()}
            index[step] = self._buffer.add(**picked, env_ids=streams[step], **extras)
        return torch.from_numpy(index)

    def add(self, tensordict: TensorDictBase) -> Tensor:
        """Stores one transition, a tensordict without batch dimensions; its id."""
        return self.extend(tensordict.unsqueeze(0))[0]

    def _build(self, flat: TensorDictBase) -> ReplayBuffer:
        own = {*((key,) for key in self._obs_keys), ("action",)}
        keys = [key if isinstance(key, tuple) else (key,) for key in flat.keys(True, True)]
        self._extras = [key for key in keys if key[0] != "next" and key not in own and key[-1] not in _ADDED]
        frame_stack = self._options["frame_stack"]
        return ReplayBuffer(
            **{
                **self._options,
                "frame_stack": {k: frame_stack if flat[k].ndim == 4 else 1 for k in self._obs_keys},
            },
            obs_shape={key: flat[key].shape[1:] for key in self._obs_keys},
            obs_dtype={key: flat[key].dtype for key in self._obs_keys},
            action_shape=flat["action"].shape[1:],
            action_dtype=flat["action"].dtype,
            extras={_column(key): (tuple(flat[key].shape[1:]), flat[key].dtype) for key in self._extras},
            on_jump="cut",
        )

    def _streams(self, tensordict: TensorDictBase, flat: TensorDictBase, done: np.ndarray) -> np.ndarray:
        """The stream of every row, int64 [N]."""
        n = len(done)
        if _TRAJECTORY in flat.keys(True):
            trajectories = flat[_TRAJECTORY].reshape(-1).tolist()
            return np.array(
                [self._stream(t, end) for t, end in zip(trajectories, done, strict=True)], np.int64
            )
        if tensordict.ndim > 1:
            environments = n // tensordict.shape[-1]
            if environments > self._num_envs:
                raise ValueError(
                    f"tensordict is of {environments} environments, num_envs is {self._num_envs}"
                )
            return np.repeat(np.arange(environments), tensordict.shape[-1])
        return np.arange(n) if n == self._num_envs else np.zeros(n, np.int64)

    def _stream(self, trajectory: int, ends: bool) -> int:
        """That of the trajectory; for a new one, that which waited longest, preferably an idle one."""
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

    # ---- sampling ----

    def sample(self, batch_size: int | None = None) -> TensorDict:
        """A TensorDict [B] of transitions, drawn with replacement."""
        size = batch_size if batch_size is not None else self.batch_size
        if size is None:
            raise ValueError("batch_size is needed: give it here or when building the buffer")
        batch = self.buffer.sample(size, dtype=self.pixels_dtype)
        done = batch.terminated | batch.truncated
        entries: dict[str | Key, Tensor] = {
            "action": batch.action,
            _REWARD: batch.reward[:, None],
            _DONE: done[:, None],
            _TERMINATED: batch.terminated[:, None],
            _TRUNCATED: batch.truncated[:, None],
            "index": batch.index,
        }
        for key in self._obs_keys:
            entries[key] = batch.obs[key]  # type: ignore[index]
            entries["next", key] = batch.next_obs[key]  # type: ignore[index]
        for path in self._extras:
            entries[path] = batch.extras[_column(path)]
        if isinstance(self.buffer.sampler, Prioritized):
            entries["priority_weight"] = batch.weight
        if self.buffer.n_step > 1:
            _, alive = self.buffer.windows(batch.index, self.buffer.n_step)
            entries["steps_to_next_obs"] = torch.from_numpy(alive.sum(axis=1, keepdims=True))
        result = TensorDict(batch_size=[size])
        for entry, value in entries.items():
            result[entry] = value
        return result.to(self.device)

    def update_tensordict_priority(self, tensordict: TensorDictBase) -> None:
        """Takes the priorities of sampled transitions from `priority_key`; without a prioritized sampler, or
        without that entry, it does nothing, as in TorchRL."""
        priority = tensordict.get(self.priority_key, None)
        if isinstance(self.buffer.sampler, Prioritized) and priority is not None:
            self.buffer.update_priorities(tensordict["index"], priority.detach().abs())

    # ---- saving ----

    def state_dict(self) -> dict[str, Any]:
        return {
            "buffer": None if self._buffer is None else self._buffer.__getstate__(),
            "extras": list(self._extras),
            "streams": {
                "of": dict(self._stream_of),
                "last_used": self._last_used.copy(),
                "clock": self._clock,
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._extras = [tuple(key) for key in state["extras"]]
        self._stream_of = dict(state["streams"]["of"])
        self._last_used, self._clock = state["streams"]["last_used"].copy(), state["streams"]["clock"]
        self._buffer = None
        if state["buffer"] is not None:
            self._buffer = ReplayBuffer.__new__(ReplayBuffer)
            self._buffer.__setstate__(state["buffer"])


_ADDED = {"index", "priority_weight", "steps_to_next_obs", "done", "terminated", "truncated"}


def _column(key: Key) -> str:
    """The buffer's name for a root entry; with the slash no argument of `ReplayBuffer.add` has it."""
    return "/" + "/".join(key)


def _flag(flat: TensorDictBase, key: Key, default: np.ndarray) -> np.ndarray:
    return flat[key].reshape(-1).numpy() if key in flat.keys(True) else default


def _steps(streams: np.ndarray) -> list[np.ndarray]:
    """Rows in groups that hold every stream at most once, each stream's rows in their order."""
    order = np.argsort(streams, kind="stable")
    ordered = streams[order]
    starts = (
        np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else np.zeros(0, np.int64)
    )
    occurrence = np.empty(len(streams), np.int64)
    occurrence[order] = np.arange(len(streams)) - np.repeat(starts, np.diff(np.r_[starts, len(streams)]))
    by_step = np.argsort(occurrence, kind="stable")
    return np.split(by_step, np.flatnonzero(np.diff(occurrence[by_step])) + 1) if len(streams) else []
