"""How the entries of a tensordict are stored in a `covr_fast.ReplayBuffer`, and how they are restored."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from .torchrl_entries import Key, Shape, text, texts

DONE, TERMINATED, TRUNCATED = (("next", name) for name in ("done", "terminated", "truncated"))
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Keys:
    """The entries with a special meaning."""

    obs: tuple[Key, ...]
    action: Key
    reward: Key
    """It starts with "next"."""


@dataclass(frozen=True)
class Entry:
    """An entry, and the shape and dtype of its rows."""

    key: Key
    shape: Shape
    dtype: torch.dtype
    column: str | None
    """Its name in the buffer; None if it is the action, the reward or an end of the buffer."""

    @property
    def stored_dtype(self) -> torch.dtype:
        return stored_dtype(self.dtype)

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
class Rows:
    """N transitions as `ReplayBuffer.add` takes them."""

    obs: dict[str, np.ndarray]
    next_obs: dict[str, np.ndarray]
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    extras: dict[str, np.ndarray]

    @property
    def ends(self) -> np.ndarray:
        ends: np.ndarray = self.terminated | self.truncated
        return ends

    def at(self, picked: np.ndarray) -> dict[str, Any]:
        """The arguments of `add` for these rows."""
        return {
            "obs": {name: values[picked] for name, values in self.obs.items()},
            "next_obs": {name: values[picked] for name, values in self.next_obs.items()},
            "action": self.action[picked],
            "reward": self.reward[picked],
            "terminated": self.terminated[picked],
            "truncated": self.truncated[picked],
            **{name: values[picked] for name, values in self.extras.items()},
        }


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
    nested: dict[Key, Shape] = field(default_factory=dict)
    """Nested tensordicts and their batch dimensions after the rows."""

    @classmethod
    def of(cls, entries: Mapping[Key, Tensor], nested: dict[Key, Shape], keys: Keys, n_step: int) -> "Layout":
        for key in (*keys.obs, *(("next", *key) for key in keys.obs)):
            _need(entries, nested, key, "obs_keys")
        _need(entries, nested, keys.action, "action_key")
        _need(entries, nested, keys.reward, "reward_key")
        if complex_ones := [key for key, tensor in entries.items() if tensor.dtype.is_complex]:
            raise ValueError(
                f"{texts(complex_ones)} are complex, the buffer holds real numbers: give torch.view_as_real"
            )
        given = [key for key in (DONE, TERMINATED, TRUNCATED) if key in entries]
        _need_an_end(entries)
        for key in given:
            _check_flag(entries[key], key)
        own = {*keys.obs, *(("next", *key) for key in keys.obs), keys.action, keys.reward, *given}
        reward = entries[keys.reward]
        _check_reward(reward, keys.reward, n_step)
        core = reward.dtype == torch.float32 and math.prod(reward.shape[1:]) == 1
        ends = []
        for key in (DONE, TERMINATED, TRUNCATED):
            flag = entries.get(key)
            shape = tuple((entries[given[0]] if flag is None else flag).shape[1:])
            ends.append(Entry(key, shape, torch.bool, None if flag is None else column(key)))
        return cls(
            obs=tuple(_entry(entries, key, column(key).removeprefix("/")) for key in keys.obs),
            action=_entry(entries, keys.action, None),
            reward=_entry(entries, keys.reward, None if core else column(keys.reward)),
            ends=tuple(ends),
            others=tuple(_entry(entries, key, column(key)) for key in entries if key not in own),
            nested=nested,
        )

    @property
    def columns(self) -> tuple[Entry, ...]:
        """The extras of the buffer. An entry whose rows are empty needs none."""
        several = (self.reward, *self.ends, *self.others)
        return tuple(e for e in several if e.column is not None and 0 not in e.shape)

    def rows(self, entries: Mapping[Key, Tensor], frame_stack: int) -> Rows:
        """The transitions of a flat tensordict's entries, each [N, *shape].

        Raises:
            ValueError: entries that the buffer could not return as they are.
        """
        self._check_keys(entries)
        for entry in (self.action, self.reward, *self.ends, *self.others):
            if entry.key in entries:
                entry.check(entries[entry.key], entry.key)
        for entry in self.obs:
            for key in (entry.key, ("next", *entry.key)):
                entry.check(entries[key], key)
                _refuse_not_finite(key, entries[key])
            if frame_stack > 1 and len(entry.shape) == 3:
                _check_slide(entry, entries, frame_stack)
        for key in (self.action.key, self.reward.key):
            _refuse_not_finite(key, entries[key])
        for entry in self.others:
            _refuse_nan(entry.key, entries[entry.key])
        n = len(entries[self.action.key])
        reward = entries[self.reward.key]
        reward = reward if self.reward.column is None else reward.double().reshape(n, -1).sum(1)
        reward = reward.float().reshape(n)
        _refuse(self.reward.key, ~torch.isfinite(reward), "beyond the range of float32")
        terminated, truncated = _ends(entries)
        return Rows(
            obs={str(e.column): e.frames(entries[e.key]) for e in self.obs},
            next_obs={str(e.column): e.frames(entries["next", *e.key]) for e in self.obs},
            action=self.action.rows(entries[self.action.key]),
            reward=reward.numpy(),
            terminated=terminated,
            truncated=truncated,
            extras={str(e.column): e.rows(entries[e.key]) for e in self.columns},
        )

    def _check_keys(self, entries: Mapping[Key, Tensor]) -> None:
        obs = [key for e in self.obs for key in (e.key, ("next", *e.key))]
        stored = [e.key for e in (*self.ends, *self.others) if e.column is not None]
        needed = {*obs, self.action.key, self.reward.key, *stored}
        known = needed | {e.key for e in self.ends}
        if missing := needed - entries.keys():
            raise ValueError(
                f"the tensordict lacks {texts(missing)}, which the first one had: every transition needs a "
                "value. Add them, or build a buffer without them"
            )
        if unknown := entries.keys() - known:
            raise ValueError(
                f"the tensordict has {texts(unknown)}, which the first one had not: those before it have no "
                "value for them. Leave them out (tensordict.exclude), or empty() the buffer first"
            )
        _need_an_end(entries)

    def check_same(self, other: "Layout") -> None:
        """Raises ValueError if another layout, of a saved buffer, has other entries."""
        ours, saved = ({e.key: (e.dtype, e.shape) for e in layout._all()} for layout in (self, other))
        if differing := {key for key in ours.keys() | saved if ours.get(key) != saved.get(key)}:
            told = "; ".join(
                f"{text(key)} is {saved.get(key)} there and {ours.get(key)} here" for key in sorted(differing)
            )
            raise ValueError(
                f"the state has other entries than this buffer: {told}. empty() the buffer first"
            )

    def _all(self) -> tuple[Entry, ...]:
        return (*self.obs, self.action, self.reward, *self.ends, *self.others)

    def tensordict(self, values: Mapping[Key, Tensor], size: int) -> TensorDict:
        """The values, with nested tensordicts as they were."""
        result = TensorDict(batch_size=[size])
        for key, dims in sorted(self.nested.items(), key=lambda item: len(item[0])):
            result[key] = TensorDict(batch_size=[size, *dims])
        for key, value in values.items():
            result[key] = value
        return result

    def state_dict(self) -> dict[str, Any]:
        return {
            "obs": [entry.state_dict() for entry in self.obs],
            "action": self.action.state_dict(),
            "reward": self.reward.state_dict(),
            "ends": [entry.state_dict() for entry in self.ends],
            "others": [entry.state_dict() for entry in self.others],
            "nested": [[list(key), list(dims)] for key, dims in self.nested.items()],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Layout":
        return cls(
            obs=tuple(map(Entry.from_state, state["obs"])),
            action=Entry.from_state(state["action"]),
            reward=Entry.from_state(state["reward"]),
            ends=tuple(map(Entry.from_state, state["ends"])),
            others=tuple(map(Entry.from_state, state["others"])),
            nested={tuple(key): tuple(dims) for key, dims in state["nested"]},
        )


def column(key: Key) -> str:
    """An entry's name in the buffer. The slash keeps it apart from the arguments of `ReplayBuffer.add`."""
    return "".join("/" + part.replace("\\", "\\\\").replace("/", "\\/") for part in key)


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself or, if numpy lacks it, the integer dtype with as many bits."""
    try:
        torch.empty(0, dtype=dtype, device="cpu").numpy()
    except TypeError:
        return _BITS[dtype.itemsize]
    return dtype


def _entry(entries: Mapping[Key, Tensor], key: Key, name: str | None) -> Entry:
    return Entry(key, tuple(entries[key].shape[1:]), entries[key].dtype, name)


def _need(entries: Mapping[Key, Tensor], nested: Mapping[Key, Shape], key: Key, option: str) -> None:
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


def _need_an_end(entries: Mapping[Key, Tensor]) -> None:
    if DONE not in entries and TERMINATED not in entries:
        raise ValueError(f"the tensordict has neither {text(DONE)} nor {text(TERMINATED)}: set one of them")


def _check_flag(tensor: Tensor, key: Key) -> None:
    if tensor.dtype != torch.bool or math.prod(tensor.shape[1:]) != 1:
        raise ValueError(
            f"{text(key)} has rows of {tensor.dtype} {tuple(tensor.shape[1:])}: it must be one bool per row. "
            "Where agents end separately, say when the environment ends, with any() or all() over them"
        )


def _check_reward(reward: Tensor, key: Key, n_step: int) -> None:
    if n_step > 1 and not reward.dtype.is_floating_point:
        raise ValueError(
            f"{text(key)} is {reward.dtype}, which cannot hold sums over n_step={n_step} discounted steps: "
            "cast it to torch.float32"
        )


def _check_slide(entry: Entry, entries: Mapping[Key, Tensor], frame_stack: int) -> None:
    new = entry.shape[0] // frame_stack
    older, newer = entries["next", *entry.key][:, : entry.shape[0] - new], entries[entry.key][:, new:]
    bits = _BITS[entry.dtype.itemsize]
    older, newer = older.view(bits), newer.view(bits)
    if torch.equal(older, newer):
        return
    differ = (older != newer).flatten(1).any(1)
    _refuse(
        ("next", *entry.key),
        differ,
        f"not {text(entry.key)} moved on by one frame",
        f"with frame_stack={frame_stack} it must be, oldest frame first; build the buffer with frame_stack=1 "
        "to store observations as they are",
    )


def _ends(entries: Mapping[Key, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """(terminated, truncated), bool [N]. Where any end of the tensordict is True, at least one of them is."""
    done, terminated, truncated = (
        None if flag is None else flag.reshape(-1)
        for flag in (entries.get(key) for key in (DONE, TERMINATED, TRUNCATED))
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


def _refuse_not_finite(key: Key, tensor: Tensor) -> None:
    if (floats := _floats(tensor)) is not None:
        _refuse(key, ~torch.isfinite(floats), "NaN or infinite")


def _refuse_nan(key: Key, tensor: Tensor) -> None:
    """Infinite values are allowed: they may have a meaning, such as the logits of forbidden actions."""
    if (floats := _floats(tensor)) is not None:
        _refuse(key, torch.isnan(floats), "NaN")


def _floats(tensor: Tensor) -> Tensor | None:
    """The floats in a dtype that torch can test; None for integers."""
    if not tensor.dtype.is_floating_point:
        return None
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor


def _refuse(
    key: Key, wrong: Tensor, what: str, remedy: str = "mend the environment or the transform"
) -> None:
    rows = wrong.reshape(len(wrong), -1).any(1) if wrong.numel() else wrong.new_zeros(0)
    if rows.any():
        raise ValueError(
            f"{text(key)} is {what} in rows {rows.nonzero()[:5, 0].tolist()}: nothing was added; {remedy}"
        )
