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

from covr_fast import _C
from covr_fast.buffer import Batch, ReplayBuffer
from covr_fast.buffer.batch import Observation
from covr_fast.buffer.storage import size_text

from ._sb3_agent import n_steps_and_gamma
from ._sb3_arrays import BufferDict, MemoryArray, guarded
from ._sb3_rows import Infos, Shape, as_flags, as_rows, timeouts
from ._sb3_stacks import Stack, channels_last, finest_stack

_TERMINATED, _TRUNCATED = 1, 2  # flags of csrc/replay.h
_CHUNK = 256  # transitions looked at together

Observations = dict[str, np.ndarray]
Rows = tuple[Observations, np.ndarray, np.ndarray, Observations, np.ndarray, np.ndarray]


class FastReplayBuffer(SB3ReplayBuffer):
    """Stable-Baselines3's ReplayBuffer, DictReplayBuffer and NStepReplayBuffer in one, each frame stored
    once.

    Same constructor, same rows for the same numpy seed, next observations right at truncations, for about one
    frame of memory per transition. `optimize_memory_usage` is accepted and makes no difference: memory is
    always saved, and `handle_timeout_termination` always works. With VecFrameStack, where episodes are
    shorter than 32 steps, the oldest few transitions are lost early: they are never drawn.

    Args:
        frame_stack: how many frames an image observation stacks. "auto" recognises it from what is added, for
            channels-first and channels-last images and for frames along an axis of their own in front (1 if
            frames do not slide), and warns where it was wrong. A dict gives it per key.
        n_steps, gamma: as in NStepReplayBuffer; samples carry `discounts` if n_steps > 1. Unless given, they
            are those of the agent that makes the buffer; without an agent 1 and 0.99. They cannot contradict
            what the agent was given.

    `rewards`, `actions`, `dones` and `timeouts` can be changed in place, as SB3's arrays; `observations` and
    `next_observations` cannot, and say so. Batches arrive on `device`; frames are kept in host memory.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        *,
        frame_stack: int | Mapping[str, int] | Literal["auto"] = "auto",
        n_steps: int | None = None,
        gamma: float | None = None,
    ) -> None:
        # Not ReplayBuffer's own constructor: it allocates its arrays.
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
        self._frame_stack = _checked_frame_stack(frame_stack, None if self._single else set(self._shapes))
        self._forget()

    def _forget(self) -> None:
        self._stacks: dict[str, Stack] = {}
        self._proven = False  # the stacks are
        self._between = np.zeros((self.buffer_size, self.n_envs), bool)  # rows that are no transitions
        self._buffer: ReplayBuffer | None = None

    def _space(self, name: str) -> spaces.Space:
        return self.observation_space if self._single else self.observation_space[name]  # type: ignore[index]

    @property
    def buffer(self) -> ReplayBuffer:
        """The covr_fast.ReplayBuffer that holds the transitions, once there are any."""
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
            next_obs: what followed, at truncations the final observation. At terminations, where it has no
                use, it may be the reset: obs moved on by its newest frame is then stored.
            done: terminated, or ended at all if `infos` tell the truncations.
            infos: SB3's list of dicts, or gymnasium's dict of arrays.

        Raises:
            ValueError: shapes or values that would be stored as something else; NaN or infinite values;
                observations that contradict a frame_stack that was given. Nothing was added.
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
        """In the space's dtype, as SB3 casts where environments do not keep to it."""
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
        """bool [n_envs]: which of the rows are no transitions."""
        if self._buffer is not None:
            if self.pos != self._buffer.stream_bounds()[2][0] % self.buffer_size:
                raise ValueError(f"pos was set to {self.pos}: it cannot be moved; reset() forgets everything")
            return self._add(rows)
        for name in self._shapes:
            self._stacks[name] = self._recognise(name, rows)
        self._buffer = self._build()
        try:
            return self._add(rows)
        except Exception:
            self._forget()  # a row that is refused says nothing about its frames
            raise

    def _add(self, rows: Rows) -> np.ndarray:
        try:
            self.buffer.add(*rows)
            return np.zeros(self.n_envs, bool)
        except _C.FrameStackError as error:
            between = self._between_episodes(rows)
            if between is None:
                self._drop_guess(rows, error)
                return self._add(rows)
        if between.any() and not self._between.any():
            warnings.warn(_NO_TRANSITION, stacklevel=4)
        obs, action, reward, next_obs, *ends = rows
        next_obs = {name: stack.moved_on(obs[name], next_obs[name]) for name, stack in self._stacks.items()}
        # Apart from what was before and comes after, so that no n-step return reaches across.
        apart = np.flatnonzero(between)
        self.buffer.cut(apart)
        self.buffer.add(obs, action, reward, next_obs, *ends)
        self.buffer.cut(apart)
        return between

    # ---- frame stacks ----

    def _recognise(self, name: str, rows: Rows) -> Stack:
        shape = self._shapes[name]
        declared = self._frame_stack
        if isinstance(declared, Mapping):
            declared = declared.get(name, 1)
        elif declared != "auto" and not self._single and len(shape) < 3:
            declared = 1  # an integer means the images
        if declared != "auto":
            return Stack(shape, declared, channels_last(shape))
        telling = ~rows[4] if not rows[4].all() else rows[4]  # after terminations may come anything
        stack = finest_stack(shape, rows[0][name][telling], rows[3][name][telling])
        if len(shape) >= 3 and stack.frames == 1 and rows[4].all():
            warnings.warn(_NOTHING_TOLD.format(name), stacklevel=4)
        return stack

    def _between_episodes(self, rows: Rows) -> np.ndarray | None:
        """bool [n_envs], of rows that do not slide: those that lead from one episode into the next, and are
        no transitions. At terminations next_obs has no use and may be anything. None: these are no stacks."""
        obs, next_obs, terminated = rows[0], rows[3], rows[4]
        proven = self._are_proven(obs, next_obs, terminated)
        if self._frame_stack == "auto" and not proven:
            return None
        between = np.zeros(self.n_envs, bool)
        for name, stack in self._stacks.items():
            jumps = ~stack.slides(obs[name], next_obs[name]) & ~terminated
            if (jumps & ~(stack.begins_episode(next_obs[name]) & proven)).any():
                return None
            between |= jumps
        return between

    def _are_proven(self, obs: Observations, next_obs: Observations, terminated: np.ndarray) -> bool:
        """Whether these rows, or any that are stored, prove the stacks."""
        self._proven = self._proven or self._prove(obs, next_obs, terminated)
        if self._proven:
            return True
        ids = self._all_ids()
        newest_first = np.sort(ids[ids >= 0])[::-1]
        for start in range(0, len(newest_first), _CHUNK):
            batch = self.buffer.get(newest_first[start : start + _CHUNK].copy(), dtype=torch.uint8)
            before, after = (
                {name: value.numpy() for name, value in self._to_given(part).items()}
                for part in (batch.obs, batch.next_obs)
            )
            if self._prove(before, after, batch.terminated.numpy()):
                self._proven = True
                return True
        return False

    def _prove(self, obs: Observations, next_obs: Observations, terminated: np.ndarray) -> bool:
        """Whether there is a row whose frames slide and differ: a picture that stands still slides anyhow."""
        moved = ~terminated
        for name, stack in self._stacks.items():
            if stack.frames > 1:
                moved = moved & stack.slides(obs[name], next_obs[name]) & stack.differs(next_obs[name])
        return bool(moved.any())

    def _drop_guess(self, rows: Rows, error: ValueError) -> None:
        """Rebuilds the buffer with the fewer frames that these rows allow, or raises their error."""
        old, before = self.buffer, self._stacks
        if self._frame_stack != "auto":
            raise error
        for name, stack in before.items():
            while not stack.slides(rows[0][name], rows[3][name]).all():
                stack = stack.coarser()
            self._stacks = {**self._stacks, name: stack}
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
            self._buffer._storage.start_at(first)  # or positions would change their transitions
            try:
                for t in range(int(first.min()), int(count.max())):
                    self._copy_step(old, t)
                return
            except _C.FrameStackError:
                self._stacks = {name: stack.coarser() for name, stack in self._stacks.items()}

    def _copy_step(self, old: ReplayBuffer, t: int) -> None:
        ids = np.arange(t * self.n_envs, (t + 1) * self.n_envs)
        ids = ids[old.contains(ids).numpy()]
        if not len(ids):
            return
        batch = old.get(ids, dtype=torch.uint8)
        envs = ids % self.n_envs
        self.buffer.add(
            self._to_given(batch.obs),
            batch.action,
            batch.reward,
            self._to_given(batch.next_obs),
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
        """Ids, -1 for rows that are no transitions, from SB3's source of randomness, numpy's global one, in
        SB3's order."""
        positions = np.random.randint(0, upper, size=n)  # noqa: NPY002
        envs = np.random.randint(0, self.n_envs, size=n)  # noqa: NPY002
        return np.where(self._between[positions, envs], -1, self._ids(positions, envs))

    def _drawable(self) -> np.ndarray:
        """bool [buffer_size, n_envs]"""
        return (self._all_ids() >= 0) & ~self._between

    def _ids(self, positions: np.ndarray, envs: np.ndarray) -> np.ndarray:
        """Ids of the transitions at these positions of the environments' rings, -1 where there are none."""
        rows = np.asarray(envs, np.int64) * self.buffer_size + np.asarray(positions, np.int64)
        return self.buffer._core.ids_in_rows(rows)

    def _all_ids(self) -> np.ndarray:
        """Those of all positions, [buffer_size, n_envs]."""
        positions, envs = np.divmod(np.arange(self.buffer_size * self.n_envs), self.n_envs)
        return self._ids(positions, envs).reshape(self.buffer_size, self.n_envs)

    def _samples(
        self, ids: np.ndarray, env: VecNormalize | None
    ) -> ReplayBufferSamples | DictReplayBufferSamples:
        batch = self._batch(ids, self.n_steps)
        obs, next_obs = self._to_given(batch.obs), self._to_given(batch.next_obs)
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

    def _to_given(self, observations: Observation) -> dict[str, Tensor]:
        """Sampled observations in the layout that the environments give them."""
        last = {name for name, stack in self._stacks.items() if stack.channels_last}
        return {
            name: value.permute(0, 2, 3, 1) if name in last else value
            for name, value in observations.items()  # type: ignore[union-attr]
        }

    def _on_device(self, observations: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        moved = {name: value.to(self.device) for name, value in observations.items()}
        return moved["obs"] if self._single else moved

    def _rewards(self, ids: np.ndarray, env: VecNormalize | None) -> tuple[Tensor, Tensor]:
        """(n-step rewards, discounts), float32 [B, 1]. VecNormalize clips, so it comes before the sum."""
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
        """One step of zeros: what SB3's arrays hold before anything is added."""
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

    # ---- SB3's arrays [buffer_size, n_envs, ...], for those who look at them or change them ----

    @property
    def rewards(self) -> np.ndarray:
        """float32, the buffer's own memory until `reset`, or until a guess of the frame stack is dropped."""
        return self._memory("reward", (), np.float32)

    @rewards.setter
    def rewards(self, values: np.ndarray) -> None:
        self._replace("rewards", values)

    @property
    def actions(self) -> np.ndarray:
        """The buffer's own memory, as `rewards`."""
        return self._memory("column.action", (self.action_dim,), self._action_dtype)

    @actions.setter
    def actions(self, values: np.ndarray) -> None:
        self._replace("actions", values)

    @property
    def dones(self) -> np.ndarray:
        """float32. Setting elements of this array terminates those transitions, or takes back their end."""
        return self._ends("dones", _TERMINATED | _TRUNCATED)

    @dones.setter
    def dones(self, values: np.ndarray) -> None:
        self._replace("dones", values)

    @property
    def timeouts(self) -> np.ndarray:
        """float32. Setting elements of this array truncates those transitions, or makes a truncation a
        termination."""
        return self._ends("timeouts", _TRUNCATED)

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
        return self._buffer._storage.ring(name).swapaxes(0, 1).view(MemoryArray)

    def _replace(self, name: str, values: np.ndarray) -> None:
        own = getattr(self, name)
        if np.shape(values) != own.shape:
            raise ValueError(f"{name} has shape {np.shape(values)}: it must be {own.shape}")
        own[...] = values

    def _ends(self, name: str, bits: int) -> np.ndarray:
        flags = self._memory("flags", (), np.uint8)
        ends = (np.asarray(flags) & bits != 0).astype(np.float32, order="C")
        if self._buffer is None:
            return guarded(ends, _NOTHING_TO_CHANGE)
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
        held = np.flatnonzero(ids >= 0)
        for start in range(0, len(held), _CHUNK):
            rows = held[start : start + _CHUNK]
            batch = self._batch(ids[rows], 1)
            for key, values in self._to_given(getattr(batch, part)).items():
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
_NOTHING_TOLD = (
    "frame_stack of {0!r} is taken for 1: all first steps terminated, so their next_obs says nothing about "
    "frames. If observations are stacks, pass frame_stack= (in replay_buffer_kwargs)"
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


def _checked_frame_stack(
    given: int | Mapping[str, int] | Literal["auto"], keys: set[str] | None
) -> int | Mapping[str, int] | Literal["auto"]:
    """keys: those of a dict observation."""
    if isinstance(given, Mapping):
        if keys is None:
            raise ValueError(f"frame_stack is {given}: a dict needs dict observations, pass an integer")
        if unknown := given.keys() - keys:
            raise ValueError(f"frame_stack names {sorted(unknown)}, the observations have {sorted(keys)}")
    elif given != "auto" and (not isinstance(given, int | np.integer) or given < 1):
        raise ValueError(f"frame_stack is {given!r}: it must be 'auto', an integer of at least 1, or a dict")
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
