"""`FastReplayBuffer` for Stable-Baselines3: `SAC("CnnPolicy", env, replay_buffer_class=FastReplayBuffer)`."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

from ..buffer import ReplayBuffer
from ._sb3_agent import n_steps_and_gamma
from ._sb3_arrays import BufferDict, MemoryArray, guarded
from ._sb3_buffer import CHUNK, StackingBuffer
from ._sb3_rows import Infos, Observations, Rows, Shape, as_flags, as_rows, timeouts
from ._sb3_stacks import FrameStack, as_given

Samples = ReplayBufferSamples | DictReplayBufferSamples

_NOTHING_TO_CHANGE = "the buffer is empty, there is nothing to change: add() transitions first"
_WHOLE_ARRAY = "this is a part of buffer.{0}: assign to buffer.{0}[position, environment] in one step"
_OBSERVATIONS_STAY = (
    "buffer.{} cannot be changed: observations share their frames with their neighbours. add() the changed "
    "transitions to another buffer, or use Stable-Baselines3's own ReplayBuffer"
)


def _array(read: Callable[[Any, str], Any], name: str, doc: str) -> Any:
    """A property of this name. Its value is read(buffer, name); assigning to it replaces all elements."""
    return property(lambda self: read(self, name), lambda self, values: self._replace(name, values), doc=doc)


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
        self._single = not isinstance(observation_space, spaces.Dict)
        space: Any = observation_space
        self._spaces: dict[str, spaces.Space[Any]] = {"obs": space} if self._single else space.spaces
        shape: Any = self.obs_shape
        self._shapes: dict[str, Shape] = {"obs": shape} if self._single else shape
        self._action_dtype = self._maybe_cast_dtype(action_space.dtype)
        self._frame_stack = _checked_frame_stack(frame_stack, self._shapes, self._single)
        self._stored: StackingBuffer | None = None  # until the first `add`

    @property
    def buffer(self) -> ReplayBuffer:
        """The covr_fast.ReplayBuffer inside. IndexError before the first `add`."""
        return self._filled.buffer

    @property
    def _filled(self) -> StackingBuffer:
        if self._stored is None:
            raise IndexError("the buffer is empty: add() transitions first")
        return self._stored

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self._stored = None

    def _zero_rows(self, n: int) -> Observations:
        return {key: np.zeros((n, *shape), self._spaces[key].dtype) for key, shape in self._shapes.items()}

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
        shape, flat = self.action_space.shape or (), (self.action_dim,)
        actions = as_rows(action, self.n_envs, shape, self._action_dtype, "action", flat)
        rows = Rows(
            self._observation_rows(obs, "obs"),
            actions.reshape(self.n_envs, self.action_dim),
            as_rows(reward, self.n_envs, (), np.float32, "reward", (1,)),
            self._observation_rows(next_obs, "next_obs"),
            ended & ~cut_off,
            cut_off,
        )
        stored = self._stored or StackingBuffer(self._options(), self._frame_stack, rows)
        if self.pos != stored.position:
            raise ValueError(f"pos was set to {self.pos}: it cannot be moved; reset() forgets everything")
        stored.add(rows)
        self._stored = stored  # not earlier: the frame stack of a row that is refused may be wrong
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
            label, space = what if self._single else f"{what}[{name!r}]", self._spaces[name]
            others = [()] if isinstance(space, spaces.Discrete) else []
            rows[name] = as_rows(given[name], self.n_envs, shape, space.dtype, label, *others)
        return rows

    def _options(self) -> dict[str, Any]:
        """Of the covr_fast.ReplayBuffer inside."""
        return {
            "capacity": self.buffer_size * self.n_envs,
            "num_envs": self.n_envs,
            "obs_shape": self._shapes,
            "obs_dtype": {name: _torch_dtype(self._spaces[name].dtype) for name in self._shapes},
            "action_shape": (self.action_dim,),
            "action_dtype": _torch_dtype(self._action_dtype),
        }

    # ---- sampling ----

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> Samples:  # type: ignore[override]
        """Uniform over what is stored; the same rows as SB3 draws from the same numpy random state.

        Raises:
            IndexError: none of the rows is a transition.
        """
        upper = self.buffer_size if self.full else self.pos
        if self._stored is None and upper > 0:
            return self._zeros().sample(batch_size, env)
        ids = self._draw(upper, batch_size)
        while (lost := ids < 0).any():
            if lost.all() and ((self._filled.ids() < 0) | self._filled.between).all():
                raise IndexError("nothing to sample: no row is a transition yet; add() some first")
            ids[lost] = self._draw(upper, int(lost.sum()))
        return self._samples(ids, env)

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> Samples:  # type: ignore[override]
        envs = np.random.randint(0, self.n_envs, size=len(batch_inds))  # noqa: NPY002
        ids = self.buffer.ids_at(envs, batch_inds)
        if (ids < 0).any():
            raise IndexError(f"positions {np.asarray(batch_inds)[ids < 0]} hold no transition")
        return self._samples(ids, env)

    def _draw(self, upper: int, n: int) -> np.ndarray:
        """Ids, -1 for rows that are not transitions. They come from numpy's global random state and in SB3's
        order, as in SB3."""
        positions = np.random.randint(0, upper, size=n)  # noqa: NPY002
        envs = np.random.randint(0, self.n_envs, size=n)  # noqa: NPY002
        return np.where(self._filled.between[positions, envs], -1, self.buffer.ids_at(envs, positions))

    def _samples(self, ids: np.ndarray, env: VecNormalize | None) -> Samples:
        batch = self._filled.get(ids, self.n_steps)
        rewards, discounts = self._rewards(ids, env)
        samples = ReplayBufferSamples if self._single else DictReplayBufferSamples
        return samples(
            observations=self._observation(batch.obs, env),
            actions=batch.action.to(self.device),
            next_observations=self._observation(batch.next_obs, env),
            dones=batch.terminated.to(self.device, torch.float32).reshape(-1, 1),
            rewards=rewards.to(self.device),
            discounts=discounts.to(self.device) if self.n_steps > 1 else None,
        )

    def _observation(self, sampled: dict[str, Tensor], env: VecNormalize | None) -> Any:
        """As SB3 gives it, a tensor or a dict of tensors."""
        arrays = as_given(self._filled.stacks, sampled)
        value: Any = arrays["obs"] if self._single else arrays
        if env is not None:
            value = env.normalize_obs(value)
        if self._single:
            return torch.as_tensor(value, device=self.device)
        return {name: torch.as_tensor(array, device=self.device) for name, array in value.items()}

    def _rewards(self, ids: np.ndarray, env: VecNormalize | None) -> tuple[Tensor, Tensor]:
        """(n-step rewards, discounts), float32 [B, 1]. VecNormalize clips each reward, not the sum."""
        rewards, alive = self.buffer.windows(ids, self.n_steps)
        if env is not None:
            rewards = env.normalize_reward(rewards)
        powers = self.gamma ** np.arange(self.n_steps, dtype=np.float32)
        total = (rewards * alive * powers).sum(axis=1, keepdims=True).astype(np.float32)
        discounts = (self.gamma ** alive.sum(axis=1, keepdims=True)).astype(np.float32)
        return torch.from_numpy(total), torch.from_numpy(discounts)

    def _zeros(self) -> "FastReplayBuffer":
        """A buffer with one step of zeros, which SB3's arrays contain before anything is added."""
        blank = copy.copy(self)
        blank.buffer_size = 1
        blank.reset()
        zeros, zero = self._zero_rows(self.n_envs), np.zeros(self.n_envs)
        obs = zeros["obs"] if self._single else zeros
        action = np.zeros((self.n_envs, self.action_dim), self._action_dtype)
        blank.add(obs, obs, action, zero, zero, [{}] * self.n_envs)
        return blank

    # ---- SB3's arrays [buffer_size, n_envs, ...], to read and to change ----

    def _memory(self, name: str) -> np.ndarray:
        if self._stored is not None:
            return self.buffer.ring(name.removesuffix("s")).swapaxes(0, 1).view(MemoryArray)
        shape, dtype = ((), np.float32) if name == "rewards" else ((self.action_dim,), self._action_dtype)
        return guarded(np.zeros((self.buffer_size, self.n_envs, *shape), dtype), _NOTHING_TO_CHANGE)

    def _ends(self, name: str) -> np.ndarray:
        ends = np.zeros((self.buffer_size, self.n_envs), np.float32)
        if self._stored is None:
            return guarded(ends, _NOTHING_TO_CHANGE)
        for kind in ("terminated", "truncated") if name == "dones" else ("truncated",):
            ends[self.buffer.ring(kind).T] = 1
        return guarded(ends, _WHOLE_ARRAY.format(name), lambda *change: self._set_ends(name, *change))

    def _set_ends(self, name: str, which: np.ndarray, values: np.ndarray) -> None:
        """which: flat indices into [buffer_size, n_envs]."""
        if not np.isin(values, (0, 1)).all():
            raise ValueError(f"{name} are 0 or 1, got {values[~np.isin(values, (0, 1))][0]}")
        positions, envs = np.divmod(which, self.n_envs)
        ids = self.buffer.ids_at(envs, positions)
        correct = self.buffer.set_terminated if name == "dones" else self.buffer.set_truncated
        correct(ids[ids >= 0], values[ids >= 0] != 0)

    def _rebuilt(self, name: str) -> np.ndarray | dict[str, np.ndarray]:
        """Zeros where nothing is stored."""
        arrays = self._zero_rows(self.buffer_size * self.n_envs)
        ids = np.empty(0, np.int64) if self._stored is None else self._stored.ids().reshape(-1)
        filled = np.flatnonzero(ids >= 0)
        for start in range(0, len(filled), CHUNK):
            rows = filled[start : start + CHUNK]
            batch = self._filled.get(ids[rows], 1)
            part = batch.obs if name == "observations" else batch.next_obs
            for key, values in as_given(self._filled.stacks, part).items():
                arrays[key][rows] = values
        remedy = _OBSERVATIONS_STAY.format(name)
        size = self.buffer_size, self.n_envs
        tables: Observations = {
            key: guarded(array.reshape(*size, *array.shape[1:]), remedy) for key, array in arrays.items()
        }
        return tables["obs"] if self._single else BufferDict(tables, remedy)

    def _replace(self, name: str, values: np.ndarray) -> None:
        if name in ("observations", "next_observations"):
            raise ValueError(_OBSERVATIONS_STAY.format(name))
        own = getattr(self, name)
        if np.shape(values) != own.shape:
            raise ValueError(f"{name} has shape {np.shape(values)}: it must be {own.shape}")
        own[...] = values

    rewards = _array(_memory, "rewards", "float32. The buffer's own memory, until it is reset or rebuilt.")
    actions = _array(_memory, "actions", "The buffer's own memory, as `rewards`.")
    dones = _array(_ends, "dones", "float32. 1 terminates a transition; 0 takes back its end.")
    timeouts = _array(_ends, "timeouts", "float32. 1 truncates a transition; 0 makes that a termination.")
    observations = _array(_rebuilt, "observations", "A read-only copy, rebuilt from frames on every access.")
    next_observations = _array(_rebuilt, "next_observations", "As `observations`.")


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


def _torch_dtype(dtype: Any) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
