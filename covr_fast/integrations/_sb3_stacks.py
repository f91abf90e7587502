"""Which frames an observation stacks."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..buffer.batch import Observation
from ._sb3_rows import Observations, Rows, Shape

Stacks = dict[str, "Stack"]
FrameStack = int | Mapping[str, int] | Literal["auto"]
_MOST_FRAMES = 64  # the largest frame_stack of a buffer
_ALL_TERMINATED = (
    "frame_stack of {0!r} is taken for 1: all first steps terminated, so their next_obs says nothing about "
    "frames. If observations are stacks, pass frame_stack= (in replay_buffer_kwargs)"
)


@dataclass(frozen=True)
class Stack:
    """Observations of this shape stack `frames` frames, oldest first, along their channels (along their first
    axis if they are not images). Arrays of observations are [n, *shape]."""

    shape: Shape
    frames: int
    channels_last: bool

    def coarser(self) -> "Stack":
        """The stack with the next smaller number of frames that divides the channels; itself if there is
        none."""
        stacked = self.shape[-1 if self.channels_last else 0]
        smaller = [n for n in range(1, self.frames) if stacked % n == 0]
        return replace(self, frames=smaller[-1]) if smaller else self

    def slides(self, obs: np.ndarray, next_obs: np.ndarray) -> np.ndarray:
        """bool [n]: whether next_obs is obs without its oldest frame, plus one new frame."""
        return _all_equal(self._frames(next_obs)[:, :-1], self._frames(obs)[:, 1:])

    def moved_on(self, obs: np.ndarray, next_obs: np.ndarray) -> np.ndarray:
        """obs without its oldest frame, plus the newest frame of next_obs."""
        out = np.empty_like(next_obs, order="C")
        self._frames(out)[:, :-1] = self._frames(obs)[:, 1:]
        self._frames(out)[:, -1] = self._frames(next_obs)[:, -1]
        return out

    def begins_episode(self, obs: np.ndarray) -> np.ndarray:
        """bool [n]: whether all frames are the same, or all but the newest are black."""
        frames = self._frames(obs)
        older, newest = frames[:, :-1], frames[:, -1:]
        begins: np.ndarray = _all_equal(older, newest) | _all_equal(older, np.zeros_like(newest))
        return begins

    def differs(self, obs: np.ndarray) -> np.ndarray:
        """bool [n]: whether frames differ from each other."""
        frames = self._frames(obs)
        return ~_all_equal(frames[:, :-1], frames[:, -1:])

    def _frames(self, obs: np.ndarray) -> np.ndarray:
        """A view [n, frames, channels, ...]."""
        if self.channels_last:
            obs = np.moveaxis(obs, -1, 1)
        rest = obs.shape[2:]
        return obs.reshape(len(obs), self.frames, -1, *rest) if self.shape else obs.reshape(-1, 1, 1)


# ---- the stacks of all keys; observations are dicts of arrays [n, *shape] ----


def recognised(shapes: Mapping[str, Shape], declared: FrameStack, rows: Rows) -> Stacks:
    """The declared stacks; where "auto" is declared, the finest that slide from obs to next_obs."""
    stacks = {}
    terminated = rows.terminated
    used = terminated if terminated.all() else ~terminated  # next_obs may be anything at terminations
    for name, shape in shapes.items():
        frames = declared.get(name, 1) if isinstance(declared, Mapping) else declared
        if frames != "auto":
            stacks[name] = Stack(shape, frames, channels_last(shape))
            continue
        stacks[name] = finest_stack(shape, rows.obs[name][used], rows.next_obs[name][used])
        if len(shape) >= 3 and stacks[name].frames == 1 and terminated.all():
            warnings.warn(_ALL_TERMINATED.format(name), stacklevel=4)
    return stacks


def coarser_for(stacks: Stacks, rows: Rows) -> Stacks:
    """The finest that slide from obs to next_obs and are not finer than `stacks`."""
    coarser = dict(stacks)
    for name in coarser:
        while not coarser[name].slides(rows.obs[name], rows.next_obs[name]).all():
            coarser[name] = coarser[name].coarser()
    return coarser


def proven_by(stacks: Stacks, rows: Rows) -> bool:
    """Whether there is a row whose frames slide and differ: those of a still image always slide."""
    moved = ~rows.terminated
    for name, stack in stacks.items():
        if stack.frames > 1:
            next_obs = rows.next_obs[name]
            moved = moved & stack.slides(rows.obs[name], next_obs) & stack.differs(next_obs)
    return bool(moved.any())


def between_episodes(stacks: Stacks, rows: Rows, proven: bool) -> np.ndarray | None:
    """bool [n]: rows whose frames do not slide, because they lead from one episode into the next and are not
    transitions. At terminations next_obs may be anything. None: observations are not such stacks."""
    between = np.zeros(len(rows.terminated), bool)
    for name, stack in stacks.items():
        next_obs = rows.next_obs[name]
        jumps = ~stack.slides(rows.obs[name], next_obs) & ~rows.terminated
        if (jumps & ~(stack.begins_episode(next_obs) & proven)).any():
            return None
        between |= jumps
    return between


def as_given(stacks: Stacks, observations: Observation) -> Observations:
    """Sampled observations in the layout of the environments."""
    assert isinstance(observations, dict)
    return {
        name: (value.permute(0, 2, 3, 1) if stacks[name].channels_last else value).numpy()
        for name, value in observations.items()
    }


# ---- recognising one ----


def channels_last(shape: Shape) -> bool:
    """Whether the channels are the last axis of an image: the channel axis is the shorter one."""
    return len(shape) == 3 and shape[-1] < shape[0]


def finest_stack(shape: Shape, obs: np.ndarray, next_obs: np.ndarray) -> Stack:
    """The stack with the most frames that slides from obs to next_obs. Both layouts of an image are tried, or
    the first axis of observations with more dimensions. One frame if none slides."""
    last = channels_last(shape)
    layouts = (last, not last) if len(shape) == 3 else (False,)
    for layout in layouts if len(shape) >= 3 else ():
        stack = Stack(shape, shape[-1 if layout else 0], layout)
        while stack.frames > 1:
            if stack.frames <= _MOST_FRAMES and stack.slides(obs, next_obs).all():
                return stack
            stack = stack.coarser()
    return Stack(shape, 1, last)


def _all_equal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """bool [n]; floats may differ by rounding, as for the buffer."""
    equal = a == b
    if a.dtype.kind == "f":
        rounding = 2e-3 if a.dtype.itemsize == 2 else 1e-5
        equal |= np.abs(a - b) <= rounding * np.maximum(np.abs(a), np.abs(b))
    all_equal: np.ndarray = equal.all(axis=tuple(range(1, a.ndim)))
    return all_equal
