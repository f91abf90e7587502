"""How an observation is made of frames."""

from dataclasses import dataclass, replace

import numpy as np

Shape = tuple[int, ...]
_MOST_FRAMES = 64  # that a buffer stacks


@dataclass(frozen=True)
class Stack:
    """Observations of this shape stack so many frames, oldest first, along their channels (their first axis,
    where they are no images). Arrays of observations are [n, *shape]."""

    shape: Shape
    frames: int
    channels_last: bool

    def coarser(self) -> "Stack":
        """With the next smaller number of frames that divides the channels; itself if there is none."""
        stacked = self.shape[-1 if self.channels_last else 0]
        smaller = [n for n in range(1, self.frames) if stacked % n == 0]
        return replace(self, frames=smaller[-1]) if smaller else self

    def slides(self, obs: np.ndarray, next_obs: np.ndarray) -> np.ndarray:
        """bool [n]: next_obs is obs without its oldest frame, plus one new frame."""
        return _all_equal(self._frames(next_obs)[:, :-1], self._frames(obs)[:, 1:])

    def moved_on(self, obs: np.ndarray, next_obs: np.ndarray) -> np.ndarray:
        """What slides from obs and ends with the newest frame of next_obs."""
        out = np.empty_like(next_obs, order="C")
        self._frames(out)[:, :-1] = self._frames(obs)[:, 1:]
        self._frames(out)[:, -1] = self._frames(next_obs)[:, -1]
        return out

    def begins_episode(self, obs: np.ndarray) -> np.ndarray:
        """bool [n]: one frame repeated, or one frame after black ones."""
        frames = self._frames(obs)
        older, newest = frames[:, :-1], frames[:, -1:]
        return _all_equal(older, newest) | _all_equal(older, np.zeros_like(newest))

    def differs(self, obs: np.ndarray) -> np.ndarray:
        """bool [n]: not all frames are the same."""
        frames = self._frames(obs)
        return ~_all_equal(frames[:, :-1], frames[:, -1:])

    def _frames(self, obs: np.ndarray) -> np.ndarray:
        """A view [n, frames, channels, ...]."""
        if self.channels_last:
            obs = np.moveaxis(obs, -1, 1)
        rest = obs.shape[2:]
        return obs.reshape(len(obs), self.frames, -1, *rest) if self.shape else obs.reshape(-1, 1, 1)


def channels_last(shape: Shape) -> bool:
    """The shorter side of an image has the channels."""
    return len(shape) == 3 and shape[-1] < shape[0]


def finest_stack(shape: Shape, obs: np.ndarray, next_obs: np.ndarray) -> Stack:
    """With the most frames that slide from obs to next_obs: of an image in either layout, or along the first
    axis of what has more dimensions. 1 if there are none."""
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
    return equal.all(axis=tuple(range(1, a.ndim)))
