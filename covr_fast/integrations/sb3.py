"""`FastReplayBuffer` for Stable-Baselines3: `SAC("CnnPolicy", env, replay_buffer_class=FastReplayBuffer)`."""

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

from ..buffer import Batch, FrameStackError, ReplayBuffer
from ..buffer.storage import size_text
from ._sb3_agent import n_steps_and_gamma
from ._sb3_arrays import BufferDict, MemoryArray, guarded
from ._sb3_rows import Infos, Shape, as_flags, as_rows, timeouts
from ._sb3_stacks import (
    FrameStack,
    Observations,
    Stacks,
    as_given,
    between_episodes,
    coarser_for,
    proven_by,
    recognised,
)

_CHUNK = 256  # transitions that are rebuilt together

Rows = tuple[Observations, np.ndarray, np.ndarray, Observations, np.ndarray, np.ndarray]


class FastReplayBuffer(SB3ReplayBuffer):
    """Stable-Baselines3's ReplayBuffer, DictReplayBuffer and NStepReplayBuffer in one, each frame stored
    once.

    It has the same constructor, draws the same rows for the same numpy seed, and returns the true next
    observation at truncations. It takes about one frame of memory per transition. `optimize_memory_usage` is
    accepted and makes no difference: memory is always saved, and `handle_timeout_termination` always works.
    With VecFrameStack, if episodes are shorter than 32 steps, the oldest few transitions are lost early: they
    are never drawn.

    Args:
        frame_stack: how many frames an image observation stacks. "auto" recognises it from what is added, for
            channels-first and channels-last images and for frames along a first axis (1 if frames do not
            slide), and warns if it was wrong. A dict gives it per key.
        n_steps, gamma: as in NStepReplayBuffer; samples have `discounts` if n_steps > 1. By default they are
            those of the agent that makes the buffer; without an agent 1 and 0.99. They cannot contradict what
            the agent was given.

    `rewards`, `actions`, `dones` and `timeouts` can be changed in place, as SB3's arrays. Changing
    `observations` and `next_observations` is an error. Batches arrive on `device`; frames stay in host
    memory.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        *,
        frame_stack: FrameStack = "auto",
        n_steps: int | None = None,
        gamma: float | None = None,
    ) -> None:
        # ReplayBuffer's constructor is skipped, because it allocates its arrays.
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs=n_envs)
        self.buffer_size = max(buffer_size // n_envs, 1)
        self.optimize_memory_usage = optimize_memory_usage
        self.handle_timeout_termination = handle_timeout_termination
        self.n_steps, self.gamma = n_steps_and_gamma(self, n_steps, gamma)
        self._shapes: dict[str, Shape] = (
            dict(self.obs_shape) if isinstance(self.obs_shape, dict) else {"obs": tuple(self.obs_shape)}
        )
        self._single = not isinstance(self.obs_shape, dict)
        self._dtypes = {name: _torch_dtype(self._space(name).dtype) for name in self._shapes}
        self._action_dtype = self._maybe_cast_dtype(action_space.dtype)
        self._frame_stack = _checked_frame_stack(frame_stack, self._shapes, self._single)
        self._forget()

    def _forget(self) -> None:
        self._stacks: Stacks = {}
        self._proven = False  # that observations are such stacks
        self._between = np.zeros((self.buffer_size, self.n_envs), bool)  # rows that are not transitions
        self._buffer: ReplayBuffer | None = None

    def _space(self, name: str) -> spaces.Space[Any]:
        return self.observation_space if self._single else self.observation_space[name]  # type: ignore[index]

    @property
    def buffer(self) -> ReplayBuffer:
        """The covr_fast.ReplayBuffer inside. IndexError before the first `add`."""
        if self._buffer is None:
            raise IndexError("the buffer is empty: add() transitions first")
        return self._buffer

    # ---- adding ----

    def add(
        self,
        obs: np.ndarray | dict[str, np.ndarray],
        next_obs: np.ndarray | dict[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: Infos,
    ) -> None:
        """One transition per environment.

        Args:
            next_obs: the observation after obs; at truncations the final one of the episode. At terminations,
                where it is not used, it may be that of the reset: then obs without its oldest frame, plus the
                newest frame of next_obs, is stored.
            done: the episode terminated, or was truncated and `infos` say so.
            infos: SB3's list of dicts, or gymnasium's dict of arrays.

        Raises:
            ValueError: shapes or values that would be stored as something else; NaN or infinite values;
                observations that contradict the given frame_stack. Nothing was added.
        """
        ended = as_flags(done, self.n_envs, "done")
        cut_off = np.zeros(self.n_envs, bool)
        if self.handle_timeout_termination:
            cut_off = timeouts(infos, self.n_envs)
        rows = (
            self._observation_rows(obs, "obs"),
            self._action_rows(action),
            as_rows(reward, self.n_envs, (), np.float32, "reward", (1,)),
            self._observation_rows(next_obs, "next_obs"),
            ended & ~cut_off,
            cut_off,
        )
        self._between[self.pos] = self._append(rows)
        self.pos += 1
        if self.pos == self.buffer_size:
            self.full = True
            self.pos = 0

    def _observation_rows(self, obs: np.ndarray | dict[str, np.ndarray], what: str) -> Observations:
        """In the space's dtype. As in SB3, what environments give in another dtype is cast."""
        given: Any = {"obs": obs} if self._single else obs
        rows = {}
        for name, shape in self._shapes.items():
            if name not in given:
                raise ValueError(f"{what} lacks the key {name!r} of the observation space")
            label, space = what if self._single else f"{what}[{name!r}]", self._space(name)
            others = [()] if isinstance(space, spaces.Discrete) else []
            rows[name] = as_rows(given[name], self.n_envs, shape, space.dtype, label, *others)
        return rows

    def _action_rows(self, action: np.ndarray) -> np.ndarray:
        shape, flat = self.action_space.shape or (), (self.action_dim,)
        rows = as_rows(action, self.n_envs, shape, self._action_dtype, "action", flat)
        return rows.reshape(self.n_envs, *flat)

    def _append(self, rows: Rows) -> np.ndarray:
        """bool [n_envs]: which of the rows are not transitions."""
        if self._buffer is not None:
            if self.pos != self._buffer.stream_bounds()[2][0] % self.buffer_size:
                raise ValueError(f"pos was set to {self.pos}: it cannot be moved; reset() forgets everything")
            return self._add(rows)
        self._stacks = recognised(self._shapes, self._frame_stack, rows[0], rows[3], rows[4])
        self._buffer = self._build()
        try:
            return self._add(rows)
        except Exception:
            self._forget()  # the frame stack of a row that is refused may be wrong
            raise

    def _add(self, rows: Rows) -> np.ndarray:
        try:
            self.buffer.add(*rows)
            return np.zeros(self.n_envs, bool)
        except FrameStackError as error:
            between = self._between_episodes(rows)
            if between is None:
                self._drop_guess(rows, error)
                return self._add(rows)
        if between.any() and not self._between.any():
            warnings.warn(_NO_TRANSITION, stacklevel=4)
        obs, action, reward, next_obs, *ends = rows
        next_obs = {name: stack.moved_on(obs[name], next_obs[name]) for name, stack in self._stacks.items()}
        # Cut before and after them, so that no n-step return includes them.
        apart = np.flatnonzero(between)
        self.buffer.cut(apart)
        self.buffer.add(obs, action, reward, next_obs, *ends)
        self.buffer.cut(apart)
        return between

    # ---- frame stacks ----

    def _between_episodes(self, rows: Rows) -> np.ndarray | None:
        """bool [n_envs]: which rows lead from one episode into the next. None: these are not stacks."""
        obs, next_obs, terminated = rows[0], rows[3], rows[4]
        self._proven = self._proven or proven_by(self._stacks, obs, next_obs, terminated) or self._prove()
        if self._frame_stack == "auto" and not self._proven:
            return None
        return between_episodes(self._stacks, obs, next_obs, terminated, self._proven)

    def _prove(self) -> bool:
        """Whether stored rows prove that observations are such stacks."""
        ids = self._all_ids()
        newest_first = np.sort(ids[ids >= 0])[::-1]
        for start in range(0, len(newest_first), _CHUNK):
            batch = self.buffer.get(newest_first[start : start + _CHUNK].copy(), dtype=torch.uint8)
            obs, next_obs = (
                {name: value.numpy() for name, value in as_given(self._stacks, part).items()}
                for part in (batch.obs, batch.next_obs)
            )
            if proven_by(self._stacks, obs, next_obs, batch.terminated.numpy()):
                return True
        return False

    def _drop_guess(self, rows: Rows, error: ValueError) -> None:
        """Rebuilds the buffer with the fewer frames that these rows allow, or raises their error."""
        old, before = self.buffer, self._stacks
        if self._frame_stack != "auto":
            raise error
        self._stacks = coarser_for(before, rows[0], rows[3])
        if self._stacks == before:
            raise error
        self._rebuild()
        for name, stack in self._stacks.items():
            was = before[name].frames
            if stack.frames < was:
                sizes = size_text(self.buffer.nbytes), size_text(old.nbytes)
                warnings.warn(_FEWER_FRAMES.format(name, was, stack.frames, *sizes), stacklevel=5)

    def _rebuild(self) -> None:
        old = self.buffer
        first, _, count = old.stream_bounds()
        while True:
            self._buffer = self._build()
            self._buffer.start_at(first)  # so that every transition keeps its position
            try:
                for t in range(int(first.min()), int(count.max())):
                    self._copy_step(old, t)
                return
            except FrameStackError:
                self._stacks = {name: stack.coarser() for name, stack in self._stacks.items()}

    def _copy_step(self, old: ReplayBuffer, t: int) -> None:
        ids = np.arange(t * self.n_envs, (t + 1) * self.n_envs)
        ids = ids[old.contains(ids).numpy()]
        if not len(ids):
            return
        batch = old.get(ids, dtype=torch.uint8)
        envs = ids % self.n_envs
        self.buffer.add(
            as_given(self._stacks, batch.obs),
            batch.action,
            batch.reward,
            as_given(self._stacks, batch.next_obs),
            batch.terminated,
            batch.truncated,
            env_ids=envs,
        )
        ended = [bool(old.stream_rows(int(env), t, t + 1)["end"][0]) for env in envs]
        self.buffer.cut(envs[ended])

    def _build(self) -> ReplayBuffer:
        return ReplayBuffer(
            self.buffer_size * self.n_envs,
            num_envs=self.n_envs,
            obs_shape=self._shapes,
            obs_dtype=self._dtypes,
            action_shape=(self.action_dim,),
            action_dtype=_torch_dtype(self._action_dtype),
            frame_stack={name: stack.frames for name, stack in self._stacks.items()},
            channels_last={name: stack.channels_last for name, stack in self._stacks.items()},
            on_jump="cut",  # learn() resets the environments without telling the buffer
        )

    # ---- sampling ----

    def sample(  # type: ignore[override]
        self, batch_size: int, env: VecNormalize | None = None
    ) -> ReplayBufferSamples | DictReplayBufferSamples:
        """Uniform over what is stored; the same rows as SB3 draws from the same numpy random state.

        Raises:
            IndexError: none of the rows is a transition.
        """
        upper = self.buffer_size if self.full else self.pos
        if self._buffer is None and upper > 0:
            return self._zeros().sample(batch_size, env)
        ids = self._draw(upper, batch_size)
        while (lost := ids < 0).any():
            if lost.all() and not self._drawable().any():
                raise IndexError("nothing to sample: no row is a transition yet; add() some first")
            ids[lost] = self._draw(upper, int(lost.sum()))
        return self._samples(ids, env)

    def _get_samples(  # type: ignore[override]
        self, batch_inds: np.ndarray, env: VecNormalize | None = None
    ) -> ReplayBufferSamples | DictReplayBufferSamples:
        ids = self._ids(batch_inds, np.random.randint(0, self.n_envs, size=len(batch_inds)))  # noqa: NPY002
        if (ids < 0).any():
            raise IndexError(f"positions {np.asarray(batch_inds)[ids < 0]} hold no transition")
        return self._samples(ids, env)

    def _draw(self, upper: int, n: int) -> np.ndarray:
        """Ids, -1 for rows that are not transitions. They come from numpy's global random state and in SB3's
        order, as in SB3."""
        positions = np.random.randint(0, upper, size=n)  # noqa: NPY002
        envs = np.random.randint(0, self.n_envs, size=n)  # noqa: NPY002
        return np.where(self._between[positions, envs], -1, self._ids(positions, envs))

    def _drawable(self) -> np.ndarray:
        """bool [buffer_size, n_envs]"""
        return (self._all_ids() >= 0) & ~self._between

    def _ids(self, positions: np.ndarray, envs: np.ndarray) -> np.ndarray:
        """Ids of the transitions at these positions, -1 where there are none."""
        return self.buffer.ids_at(envs, positions)

    def _all_ids(self) -> np.ndarray:
        """`_ids` of all positions, [buffer_size, n_envs]."""
        positions, envs = np.divmod(np.arange(self.buffer_size * self.n_envs), self.n_envs)
        return self._ids(positions, envs).reshape(self.buffer_size, self.n_envs)

    def _samples(
        self, ids: np.ndarray, env: VecNormalize | None
    ) -> ReplayBufferSamples | DictReplayBufferSamples:
        batch = self._batch(ids, self.n_steps)
        obs, next_obs = as_given(self._stacks, batch.obs), as_given(self._stacks, batch.next_obs)
        if env is not None:
            obs, next_obs = _normalized(obs, env), _normalized(next_obs, env)
        rewards, discounts = self._rewards(ids, env)
        samples = ReplayBufferSamples if self._single else DictReplayBufferSamples
        return samples(
            observations=self._on_device(obs),  # type: ignore[arg-type]
            actions=batch.action.to(self.device),
            next_observations=self._on_device(next_obs),  # type: ignore[arg-type]
            dones=batch.terminated.to(self.device, torch.float32).reshape(-1, 1),
            rewards=rewards.to(self.device),
            discounts=discounts.to(self.device) if self.n_steps > 1 else None,
        )

    def _batch(self, ids: np.ndarray, n_step: int) -> Batch:
        last = any(stack.channels_last for stack in self._stacks.values())
        memory_format = torch.channels_last if last else torch.contiguous_format
        return self.buffer.get(ids, n_step=n_step, dtype=torch.uint8, memory_format=memory_format)

    def _on_device(self, observations: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        moved = {name: value.to(self.device) for name, value in observations.items()}
        return moved["obs"] if self._single else moved

    def _rewards(self, ids: np.ndarray, env: VecNormalize | None) -> tuple[Tensor, Tensor]:
        """(n-step rewards, discounts), float32 [B, 1]. VecNormalize clips each reward, not the sum."""
        rewards, alive = self.buffer.windows(ids, self.n_steps)
        if env is not None:
            rewards = env.normalize_reward(rewards)
        powers = self.gamma ** np.arange(self.n_steps, dtype=np.float32)
        total = (rewards * alive * powers).sum(axis=1, keepdims=True).astype(np.float32)
        discounts = (self.gamma ** alive.sum(axis=1, keepdims=True)).astype(np.float32)
        return torch.from_numpy(total), torch.from_numpy(discounts)

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self._forget()

    def _zeros(self) -> "FastReplayBuffer":
        """A buffer with one step of zeros, which SB3's arrays contain before anything is added."""
        blank = FastReplayBuffer(
            self.n_envs,
            self.observation_space,
            self.action_space,
            self.device,
            self.n_envs,
            frame_stack=1,
            n_steps=self.n_steps,
            gamma=self.gamma,
        )
        given = {
            name: np.zeros((self.n_envs, *shape), self._space(name).dtype)
            for name, shape in self._shapes.items()
        }
        obs, zero = given["obs"] if self._single else given, np.zeros(self.n_envs)
        action = np.zeros((self.n_envs, self.action_dim), self._action_dtype)
        blank.add(obs, obs, action, zero, zero, [{}] * self.n_envs)
        return blank

    # ---- SB3's arrays [buffer_size, n_envs, ...], to read and to change ----

    @property
    def rewards(self) -> np.ndarray:
        """float32, the buffer's own memory until `reset`, or until "auto" lowers the frame stack."""
        return self._memory("reward", (), np.float32)

    @rewards.setter
    def rewards(self, values: np.ndarray) -> None:
        self._replace("rewards", values)

    @property
    def actions(self) -> np.ndarray:
        """The buffer's own memory, as `rewards`."""
        return self._memory("action", (self.action_dim,), self._action_dtype)

    @actions.setter
    def actions(self, values: np.ndarray) -> None:
        self._replace("actions", values)

    @property
    def dones(self) -> np.ndarray:
        """float32. Setting elements of this array terminates those transitions, or takes back their end."""
        return self._ends("dones", "terminated", "truncated")

    @dones.setter
    def dones(self, values: np.ndarray) -> None:
        self._replace("dones", values)

    @property
    def timeouts(self) -> np.ndarray:
        """float32. Setting elements of this array truncates those transitions, or makes a truncation a
        termination."""
        return self._ends("timeouts", "truncated")

    @timeouts.setter
    def timeouts(self, values: np.ndarray) -> None:
        self._replace("timeouts", values)

    @property  # type: ignore[override]
    def observations(self) -> np.ndarray | dict[str, np.ndarray]:
        """A read-only copy, rebuilt from frames on every access."""
        return self._rebuilt("observations", "obs")

    @observations.setter
    def observations(self, values: Any) -> None:
        raise ValueError(_OBSERVATIONS_STAY.format("observations"))

    @property  # type: ignore[override]
    def next_observations(self) -> np.ndarray | dict[str, np.ndarray]:
        """A read-only copy, rebuilt from frames on every access."""
        return self._rebuilt("next_observations", "next_obs")

    @next_observations.setter
    def next_observations(self, values: Any) -> None:
        raise ValueError(_OBSERVATIONS_STAY.format("next_observations"))

    def _memory(self, name: str, shape: Shape, dtype: Any) -> np.ndarray:
        if self._buffer is None:
            return guarded(np.zeros((self.buffer_size, self.n_envs, *shape), dtype), _NOTHING_TO_CHANGE)
        return self._buffer.ring(name).swapaxes(0, 1).view(MemoryArray)

    def _replace(self, name: str, values: np.ndarray) -> None:
        own = getattr(self, name)
        if np.shape(values) != own.shape:
            raise ValueError(f"{name} has shape {np.shape(values)}: it must be {own.shape}")
        own[...] = values

    def _ends(self, name: str, *kinds: str) -> np.ndarray:
        ends = np.zeros((self.buffer_size, self.n_envs), np.float32)
        if self._buffer is None:
            return guarded(ends, _NOTHING_TO_CHANGE)
        for kind in kinds:
            ends[self._buffer.ring(kind).T] = 1
        return guarded(ends, _WHOLE_ARRAY.format(name), lambda *change: self._set_ends(name, *change))

    def _set_ends(self, name: str, which: np.ndarray, values: np.ndarray) -> None:
        """which: flat indices into [buffer_size, n_envs]."""
        if not np.isin(values, (0, 1)).all():
            raise ValueError(f"{name} are 0 or 1, got {values[~np.isin(values, (0, 1))][0]}")
        positions, envs = np.divmod(which, self.n_envs)
        ids = self._ids(positions, envs)
        correct = self.buffer.set_terminated if name == "dones" else self.buffer.set_truncated
        correct(ids[ids >= 0], values[ids >= 0] != 0)

    def _rebuilt(self, name: str, part: Literal["obs", "next_obs"]) -> np.ndarray | dict[str, np.ndarray]:
        """Zeros where nothing is stored."""
        arrays = {
            key: np.zeros((self.buffer_size * self.n_envs, *shape), self._space(key).dtype)
            for key, shape in self._shapes.items()
        }
        ids = np.empty(0, np.int64) if self._buffer is None else self._all_ids().reshape(-1)
        stored = np.flatnonzero(ids >= 0)
        for start in range(0, len(stored), _CHUNK):
            rows = stored[start : start + _CHUNK]
            batch = self._batch(ids[rows], 1)
            for key, values in as_given(self._stacks, getattr(batch, part)).items():
                arrays[key][rows] = values.numpy()
        remedy = _OBSERVATIONS_STAY.format(name)
        tables: Observations = {
            key: guarded(array.reshape(self.buffer_size, self.n_envs, *array.shape[1:]), remedy)
            for key, array in arrays.items()
        }
        return tables["obs"] if self._single else BufferDict(tables, remedy)


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
_NOTHING_TO_CHANGE = "the buffer is empty, there is nothing to change: add() transitions first"
_WHOLE_ARRAY = "this is a part of buffer.{0}: assign to buffer.{0}[position, environment] in one step"
_OBSERVATIONS_STAY = (
    "buffer.{} cannot be changed: observations share their frames with their neighbours. add() the changed "
    "transitions to another buffer, or use Stable-Baselines3's own ReplayBuffer"
)


def _checked_frame_stack(given: FrameStack, shapes: Mapping[str, Shape], single: bool) -> FrameStack:
    """A dict if observations are: an integer is for their images."""
    if isinstance(given, Mapping):
        if single:
            raise ValueError(f"frame_stack is {given}: a dict needs dict observations, pass an integer")
        if unknown := given.keys() - shapes.keys():
            raise ValueError(f"frame_stack names {sorted(unknown)}, the observations have {sorted(shapes)}")
    elif given != "auto" and (not isinstance(given, int | np.integer) or given < 1):
        raise ValueError(f"frame_stack is {given!r}: it must be 'auto', an integer of at least 1, or a dict")
    elif given != "auto" and not single:
        return {name: given for name, shape in shapes.items() if len(shape) >= 3}
    return given


def _normalized(observations: dict[str, Tensor], env: VecNormalize) -> dict[str, Tensor]:
    arrays = {name: value.numpy() for name, value in observations.items()}
    if "obs" in arrays and not isinstance(env.observation_space, spaces.Dict):
        return {"obs": torch.as_tensor(env.normalize_obs(arrays["obs"]))}
    normalized = env.normalize_obs(arrays)
    assert isinstance(normalized, dict)
    return {name: torch.as_tensor(value) for name, value in normalized.items()}


def _torch_dtype(dtype: Any) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
