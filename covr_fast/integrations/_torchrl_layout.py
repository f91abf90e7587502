"""How the entries of a tensordict are stored in a `covr_fast.ReplayBuffer`, and how they are restored."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from ..buffer import Batch, Prioritized, ReplayBuffer
from ._torchrl_entries import Key, Keys, Shape, text, texts

DONE, TERMINATED, TRUNCATED = ENDS = tuple(("next", name) for name in ("done", "terminated", "truncated"))
_GROUPS = ("obs", "ends", "others")  # the fields of a Layout that have several entries
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Entry:
    """An entry, and the shape and dtype of its rows."""

    key: Key
    shape: Shape
    dtype: torch.dtype
    column: str | None
    """Its name in the buffer; None if it is the action, the reward or an end of the buffer."""

    @classmethod
    def of(cls, entries: Mapping[Key, Tensor], key: Key, column: str | None) -> "Entry":
        return cls(key, tuple(entries[key].shape[1:]), entries[key].dtype, column)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype itself or, if numpy lacks it, the integer dtype with as many bits."""
        try:
            torch.empty(0, dtype=self.dtype, device="cpu").numpy()
        except TypeError:
            return _BITS[self.dtype.itemsize]
        return self.dtype

    def check(self, tensor: Tensor, key: Key) -> None:
        if tensor.shape[1:] != self.shape or tensor.dtype != self.dtype:
            raise ValueError(
                f"{text(key)} has rows of {tensor.dtype} {tuple(tensor.shape[1:])}, the buffer holds rows of "
                f"{self.dtype} {self.shape}: cast or reshape it, or extend another buffer with it"
            )

    def rows(self, tensor: Tensor) -> np.ndarray:
        """As `ReplayBuffer.add` takes them. If numpy lacks the dtype, they are the bits as integers."""
        return tensor.contiguous().view(self.stored_dtype).numpy()

    def frames(self, tensor: Tensor) -> np.ndarray:
        """As `rows`, for an observation. bfloat16 is compared as bits, so -0.0 becomes 0.0."""
        return self.rows(tensor.masked_fill(tensor == 0, 0) if self.dtype == torch.bfloat16 else tensor)

    def restored(self, stored: Tensor) -> Tensor:
        return stored if self.dtype == self.stored_dtype else stored.view(self.dtype)

    def state_dict(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        return {"key": list(self.key), "shape": list(self.shape), "dtype": dtype, "column": self.column}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Entry":
        dtype = getattr(torch, state["dtype"])
        return cls(tuple(state["key"]), tuple(state["shape"]), dtype, state["column"])


@dataclass(frozen=True)
class Layout:
    """The entries that a buffer's first tensordict had. All later ones must have the same.

    Observations, the action and a float32 reward of one value are stored as such; every other entry is an
    extra of the buffer, bit for bit. Ends that the tensordicts lack follow from those that they have, as in
    TorchRL.
    """

    obs: tuple[Entry, ...]
    action: Entry
    reward: Entry
    ends: tuple[Entry, ...]
    """done, terminated, truncated."""
    others: tuple[Entry, ...]
    nested: dict[Key, Shape]
    """Nested tensordicts and their batch dimensions after the rows."""

    @classmethod
    def of(cls, entries: Mapping[Key, Tensor], nested: dict[Key, Shape], keys: Keys, n_step: int) -> "Layout":
        needed = dict.fromkeys((*keys.obs, *map(_next, keys.obs)), "obs_keys")
        needed |= {keys.action: "action_key", keys.reward: "reward_key"}
        for key, option in needed.items():
            _check_needed(entries, nested, key, option)
        if complex_ones := [key for key, tensor in entries.items() if tensor.dtype.is_complex]:
            raise ValueError(
                f"{texts(complex_ones)} are complex, the buffer holds real numbers: give torch.view_as_real"
            )
        _check_ends(entries)
        reward = entries[keys.reward]
        if n_step > 1 and not reward.dtype.is_floating_point:
            raise ValueError(
                f"{text(keys.reward)} is {reward.dtype}, which cannot hold sums over n_step={n_step} "
                "discounted steps: cast it to torch.float32"
            )
        core = reward.dtype == torch.float32 and math.prod(reward.shape[1:]) == 1
        given = {key: Entry.of(entries, key, _column(key)) for key in ENDS if key in entries}
        shape = next(iter(given.values())).shape
        return cls(
            obs=tuple(Entry.of(entries, key, _column(key).removeprefix("/")) for key in keys.obs),
            action=Entry.of(entries, keys.action, None),
            reward=Entry.of(entries, keys.reward, None if core else _column(keys.reward)),
            ends=tuple(given.get(key) or Entry(key, shape, torch.bool, None) for key in ENDS),
            others=tuple(
                Entry.of(entries, key, _column(key)) for key in entries if key not in {*needed, *given}
            ),
            nested=nested,
        )

    @property
    def columns(self) -> tuple[Entry, ...]:
        """The extras of the buffer. An entry whose rows are empty needs none."""
        several = (self.reward, *self.ends, *self.others)
        return tuple(e for e in several if e.column is not None and 0 not in e.shape)

    # ---- storing ----

    def rows(self, entries: Mapping[Key, Tensor], frame_stack: int) -> dict[str, Any]:
        """The arguments of `ReplayBuffer.add` for a flat tensordict's entries, each [N, *shape].

        Raises:
            ValueError: entries that the buffer could not return as they are.
        """
        self._check_keys(entries)
        for entry in (self.action, self.reward, *self.ends, *self.others):
            if entry.key in entries:
                entry.check(entries[entry.key], entry.key)
        for entry in self.obs:
            for key in (entry.key, _next(entry.key)):
                entry.check(entries[key], key)
                _check_floats(key, entries[key])
            if frame_stack > 1 and len(entry.shape) == 3:
                _check_slide(entry, entries, frame_stack)
        for key in (self.action.key, self.reward.key):
            _check_floats(key, entries[key])
        for entry in self.others:
            # Infinite values may have a meaning, such as the logits of forbidden actions.
            _check_floats(entry.key, entries[entry.key], infinite=True)
        n = len(entries[self.action.key])
        reward = entries[self.reward.key]
        reward = reward if self.reward.column is None else reward.double().reshape(n, -1).sum(1)
        reward = reward.float().reshape(n)
        _refuse(self.reward.key, ~reward.isfinite(), "beyond the range of float32")
        terminated, truncated = _ends(entries)
        return {
            "obs": {str(e.column): e.frames(entries[e.key]) for e in self.obs},
            "next_obs": {str(e.column): e.frames(entries[_next(e.key)]) for e in self.obs},
            "action": self.action.rows(entries[self.action.key]),
            "reward": reward.numpy(),
            "terminated": terminated,
            "truncated": truncated,
            **{str(e.column): e.rows(entries[e.key]) for e in self.columns},
        }

    def _check_keys(self, entries: Mapping[Key, Tensor]) -> None:
        obs = [key for e in self.obs for key in (e.key, _next(e.key))]
        stored = [e.key for e in (*self.ends, *self.others) if e.column is not None]
        needed = {*obs, self.action.key, self.reward.key, *stored}
        if missing := needed - entries.keys():
            raise ValueError(
                f"the tensordict lacks {texts(missing)}, which the first one had: every transition needs a "
                "value. Add them, or build a buffer without them"
            )
        if unknown := entries.keys() - needed - set(ENDS):
            raise ValueError(
                f"the tensordict has {texts(unknown)}, which the first one had not: those before it have no "
                "value for them. Leave them out (tensordict.exclude), or empty() the buffer first"
            )

    # ---- restoring ----

    def tensordict(self, batch: Batch, buffer: ReplayBuffer) -> TensorDict:
        """The transitions of a batch of the buffer, with nested tensordicts as they were."""
        size = len(batch.index)
        values = {self.action.key: self.action.restored(batch.action)}
        for entry in self.obs:
            values[entry.key] = entry.restored(batch.obs[entry.column])
            values[_next(entry.key)] = entry.restored(batch.next_obs[entry.column])
        core = {
            self.reward.key: batch.reward,
            DONE: batch.terminated | batch.truncated,
            TERMINATED: batch.terminated,
            TRUNCATED: batch.truncated,
        }
        for entry in (self.reward, *self.ends):
            if entry.column is None:
                values[entry.key] = core[entry.key].reshape(size, *entry.shape)
        for entry in self.others:
            if 0 in entry.shape:
                values[entry.key] = torch.empty(size, *entry.shape, dtype=entry.dtype, device="cpu")
        of_first = of_last = batch.extras
        if buffer.n_step > 1:
            _, alive = buffer.windows(batch.index, buffer.n_step)
            steps = torch.from_numpy(alive.sum(axis=1, keepdims=True))
            of_last = buffer.extras(batch.index + (steps[:, 0] - 1) * buffer.num_envs)
            values["steps_to_next_obs",] = steps
        for entry in self.columns:
            of_row = of_last if entry.key[0] == "next" else of_first
            values[entry.key] = entry.restored(of_row[str(entry.column)])
        if buffer.n_step > 1 and self.reward.column is not None:
            values[self.reward.key] = self._n_step_reward(buffer, batch.index, alive)
        values["index",] = batch.index
        if isinstance(buffer.sampler, Prioritized):
            values["priority_weight",] = batch.weight
        result = TensorDict(batch_size=[size])
        for key, dims in sorted(self.nested.items(), key=lambda item: len(item[0])):
            result[key] = TensorDict(batch_size=[size, *dims])
        for key, value in values.items():
            result[key] = value
        return result

    def _n_step_reward(self, buffer: ReplayBuffer, index: Tensor, alive: np.ndarray) -> Tensor:
        """The discounted sum of rewards [B, *shape], which are an extra of the buffer, over the steps that
        are alive [B, n]."""
        total = torch.zeros(len(index), *self.reward.shape, dtype=torch.float64, device="cpu")
        for k, of_step in enumerate(torch.from_numpy(alive).T):
            found = buffer.extras(index[of_step] + k * buffer.num_envs)[str(self.reward.column)]
            total[of_step] += buffer.gamma**k * self.reward.restored(found).double()
        return total.to(self.reward.dtype)

    # ---- saving ----

    def check_same(self, other: "Layout") -> None:
        """Raises ValueError if another layout, of a saved buffer, has other entries."""
        ours, saved = (
            {e.key: (e.dtype, e.shape) for e in (*of.obs, of.action, of.reward, *of.ends, *of.others)}
            for of in (self, other)
        )
        if differing := {key for key in ours.keys() | saved if ours.get(key) != saved.get(key)}:
            differences = "; ".join(
                f"{text(key)} is {saved.get(key)} there and {ours.get(key)} here" for key in sorted(differing)
            )
            raise ValueError(
                f"the state has other entries than this buffer: {differences}. empty() the buffer first"
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            **{name: [entry.state_dict() for entry in getattr(self, name)] for name in _GROUPS},
            "action": self.action.state_dict(),
            "reward": self.reward.state_dict(),
            "nested": [[list(key), list(dims)] for key, dims in self.nested.items()],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Layout":
        return cls(
            **{name: tuple(map(Entry.from_state, state[name])) for name in _GROUPS},
            action=Entry.from_state(state["action"]),
            reward=Entry.from_state(state["reward"]),
            nested={tuple(key): tuple(dims) for key, dims in state["nested"]},
        )


def _next(key: Key) -> Key:
    return ("next", *key)


def _column(key: Key) -> str:
    """An entry's name in the buffer. The slash keeps it apart from the arguments of `ReplayBuffer.add`."""
    return "".join("/" + part.replace("\\", "\\\\").replace("/", "\\/") for part in key)


def _ends(entries: Mapping[Key, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """(terminated, truncated), bool [N]. Where any end of the tensordict is True, at least one of them is."""
    done, terminated, truncated = (
        None if flag is None else flag.reshape(-1) for flag in map(entries.get, ENDS)
    )
    if terminated is None:
        if truncated is not None:
            raise ValueError(
                f"the tensordict has {text(DONE)} and {text(TRUNCATED)}, which do not tell what terminated: "
                f"set {text(TERMINATED)} too"
            )
        assert done is not None
        terminated = done
    unexplained = torch.zeros_like(terminated) if done is None else done & ~terminated
    truncated = unexplained if truncated is None else truncated | unexplained
    return terminated.numpy(), truncated.numpy()


# ---- what is refused before anything is added ----


def _check_needed(entries: Mapping[Key, Tensor], nested: Mapping[Key, Shape], key: Key, option: str) -> None:
    if key in nested:
        raise ValueError(
            f"{text(key)} of {option} is a nested tensordict: name an entry of it with a tuple, as in "
            f"({text(key)}, ...)"
        )
    if key not in entries:
        raise ValueError(f"the tensordict lacks {text(key)} of {option}: it has the entries {texts(entries)}")
    if 0 in entries[key].shape[1:]:
        raise ValueError(
            f"{text(key)} of {option} has rows {tuple(entries[key].shape[1:])}, which hold no value"
        )


def _check_ends(entries: Mapping[Key, Tensor]) -> None:
    if DONE not in entries and TERMINATED not in entries:
        raise ValueError(f"the tensordict has neither {text(DONE)} nor {text(TERMINATED)}: set one of them")
    for key in ENDS:
        if key in entries and ((flag := entries[key]).dtype != torch.bool or math.prod(flag.shape[1:]) != 1):
            raise ValueError(
                f"{text(key)} has rows of {flag.dtype} {tuple(flag.shape[1:])}: it must be one bool per row. "
                "Where agents end separately, say when the environment ends, with any() or all() over them"
            )


def _check_slide(entry: Entry, entries: Mapping[Key, Tensor], frame_stack: int) -> None:
    key, bits, new = _next(entry.key), _BITS[entry.dtype.itemsize], entry.shape[0] // frame_stack
    older, newer = entries[key][:, : entry.shape[0] - new].view(bits), entries[entry.key][:, new:].view(bits)
    if not torch.equal(older, newer):
        _refuse(
            key,
            older != newer,
            f"not {text(entry.key)} moved on by one frame",
            f"with frame_stack={frame_stack} it must be, oldest frame first; build the buffer with "
            "frame_stack=1 to store observations as they are",
        )


def _check_floats(key: Key, tensor: Tensor, *, infinite: bool = False) -> None:
    """NaN is refused, and infinity unless it is allowed."""
    if tensor.dtype.is_floating_point:
        floats = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # torch cannot test a float8
        wrong = floats.isnan() if infinite else ~floats.isfinite()
        _refuse(key, wrong, "NaN" if infinite else "NaN or infinite")


def _refuse(
    key: Key, wrong: Tensor, what: str, remedy: str = "mend the environment or the transform"
) -> None:
    rows = wrong.reshape(len(wrong), -1).any(1) if wrong.numel() else wrong.new_zeros(0)
    if rows.any():
        raise ValueError(
            f"{text(key)} is {what} in rows {rows.nonzero()[:5, 0].tolist()}: nothing was added; {remedy}"
        )
