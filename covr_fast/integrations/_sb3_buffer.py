"""The buffer inside the Stable-Baselines3 drop-in. Its frame stacks are declared, or recognised from rows."""

import warnings
from typing import Any

import numpy as np
import torch

from ..buffer import Batch, FrameStackError, ReplayBuffer
from ..buffer.storage import size_text
from ._sb3_rows import Rows
from ._sb3_stacks import FrameStack, as_given, between_episodes, coarser_for, proven_by, recognised

CHUNK = 256  # transitions that are rebuilt together

_FEWER_FRAMES = (
    "frame_stack of {0!r} was taken for {1} and is now {2}, as a next_obs is not its obs without the oldest "
    "frame plus a new one: the buffer takes {3} instead of {4}. If observations stack {1} frames, pass "
    "frame_stack={1} (in replay_buffer_kwargs), and such rows are refused; if {2}, pass that"
)
_NO_TRANSITION = (
    "the next_obs of a row is the first observation of another episode, though its own did not terminate. "
    "That is no transition (gymnasium's next-step autoreset gives one such row per episode): such rows keep "
    "their positions, but are never drawn. With AutoresetMode.SAME_STEP, and the final observation as "
    "next_obs, there are none"
)


class StackingBuffer:
    """A ReplayBuffer of n_envs streams. If the number of frames that observations stack was a guess, and a
    row shows that it was wrong, the buffer is rebuilt with fewer.

    Args:
        options: of ReplayBuffer, without those that depend on the stacks.
        rows: the first that will be added. Where frame_stack is "auto", they say what observations stack.

    Attributes:
        between: bool [positions, n_envs], the rows that lead from one episode into the next. They keep their
            positions, but are not transitions.
    """

    def __init__(self, options: dict[str, Any], frame_stack: FrameStack, rows: Rows) -> None:
        self._options, self._frame_stack = options, frame_stack
        self._n_envs: int = options["num_envs"]
        self._proven = False  # that observations are such stacks
        self.stacks = recognised(options["obs_shape"], frame_stack, rows)
        self.buffer = self._build()
        self.between = np.zeros((options["capacity"] // self._n_envs, self._n_envs), bool)

    def _build(self) -> ReplayBuffer:
        return ReplayBuffer(
            **self._options,
            frame_stack={name: stack.frames for name, stack in self.stacks.items()},
            channels_last={name: stack.channels_last for name, stack in self.stacks.items()},
            on_jump="cut",  # learn() resets the environments without telling the buffer
        )

    @property
    def position(self) -> int:
        """Where the next row of every environment is stored."""
        return int(self.buffer.stream_bounds()[2][0]) % len(self.between)

    def ids(self) -> np.ndarray:
        """int64 [positions, n_envs], the ids of all positions; -1 where nothing is stored."""
        positions, envs = np.divmod(np.arange(self.between.size), self._n_envs)
        return self.buffer.ids_at(envs, positions).reshape(self.between.shape)

    def get(self, ids: np.ndarray, n_step: int) -> Batch:
        last = any(stack.channels_last for stack in self.stacks.values())
        memory_format = torch.channels_last if last else torch.contiguous_format
        return self.buffer.get(ids, n_step=n_step, dtype=torch.uint8, memory_format=memory_format)

    def add(self, rows: Rows) -> None:
        position = self.position
        try:
            self.buffer.add(*rows)
            self.between[position] = False
            return
        except FrameStackError as error:
            between = self._between_episodes(rows)
            if between is None:
                self._drop_guess(rows, error)
                return self.add(rows)
        if between.any() and not self.between.any():
            warnings.warn(_NO_TRANSITION, stacklevel=3)
        slid = {key: stack.moved_on(rows.obs[key], rows.next_obs[key]) for key, stack in self.stacks.items()}
        # Cut before and after them, so that no n-step return includes them.
        apart = np.flatnonzero(between)
        self.buffer.cut(apart)
        self.buffer.add(*rows._replace(next_obs=slid))
        self.buffer.cut(apart)
        self.between[position] = between

    def _between_episodes(self, rows: Rows) -> np.ndarray | None:
        """bool [n_envs]: which rows lead from one episode into the next. None: these are not stacks."""
        self._proven = self._proven or proven_by(self.stacks, rows) or self._proven_by_stored()
        if self._frame_stack == "auto" and not self._proven:
            return None
        return between_episodes(self.stacks, rows, self._proven)

    def _proven_by_stored(self) -> bool:
        ids = self.ids()
        newest_first = np.sort(ids[ids >= 0])[::-1]
        chunks = (newest_first[start : start + CHUNK] for start in range(0, len(newest_first), CHUNK))
        return any(proven_by(self.stacks, self._rows(self.buffer, ids.copy())) for ids in chunks)

    def _rows(self, buffer: ReplayBuffer, ids: np.ndarray) -> Rows:
        """Stored rows as they were added."""
        batch = buffer.get(ids, dtype=torch.uint8)
        return Rows(
            as_given(self.stacks, batch.obs),
            batch.action.numpy(),
            batch.reward.numpy(),
            as_given(self.stacks, batch.next_obs),
            batch.terminated.numpy(),
            batch.truncated.numpy(),
        )

    def _drop_guess(self, rows: Rows, error: ValueError) -> None:
        """Rebuilds the buffer with the fewer frames that these rows allow, or raises their error."""
        old, before = self.buffer, self.stacks
        if self._frame_stack != "auto" or (stacks := coarser_for(before, rows)) == before:
            raise error
        self.stacks = stacks
        self._rebuild()
        for name, stack in self.stacks.items():
            was = before[name].frames
            if stack.frames < was:
                sizes = size_text(self.buffer.nbytes), size_text(old.nbytes)
                warnings.warn(_FEWER_FRAMES.format(name, was, stack.frames, *sizes), stacklevel=4)

    def _rebuild(self) -> None:
        old = self.buffer
        first, _, count = old.stream_bounds()
        while True:
            self.buffer = self._build()
            self.buffer.start_at(first)  # so that every transition keeps its position
            try:
                for t in range(int(first.min()), int(count.max())):
                    self._copy_step(old, t)
                return
            except FrameStackError:
                self.stacks = {name: stack.coarser() for name, stack in self.stacks.items()}

    def _copy_step(self, old: ReplayBuffer, t: int) -> None:
        ids = np.arange(t * self._n_envs, (t + 1) * self._n_envs)
        ids = ids[old.contains(ids).numpy()]
        if len(ids):
            envs = ids % self._n_envs
            self.buffer.add(*self._rows(old, ids), env_ids=envs)
            self.buffer.cut([env for env in envs if old.stream_rows(int(env), t, t + 1)["end"][0]])
