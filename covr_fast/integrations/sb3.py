"""`FastReplayBuffer` for Stable-Baselines3: `SAC("CnnPolicy", env, replay_buffer_class=FastReplayBuffer)`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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

Infos = Sequence[Mapping[str, Any]] | Mapping[str, Any]


class FastReplayBuffer(SB3ReplayBuffer):
    """Stable-Baselines3's ReplayBuffer, DictReplayBuffer and NStepReplayBuffer in one, each frame stored
    once.

    Same constructor, same rows for the same numpy seed, next observations right at truncations, for about one
    frame of memory per transition. `optimize_memory_usage` is accepted and makes no difference: memory is
    always saved, and `handle_timeout_termination` always works. With VecFrameStack, where episodes are
    shorter than 32 steps, the oldest few transitions are lost early: they are never drawn.

    Args:
        frame_stack: how many frames an image observation stacks. "auto" recognises it from what is added, for
            channels-first and channels-last images (1 if frames do not slide). A dict gives it per key.
        n_steps, gamma: as in NStepReplayBuffer; samples carry `discounts` if n_steps > 1.

    Batches arrive on `device`; frames are kept in host memory.
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
        n_steps: int = 1,
        gamma: float = 0.99,
    ) -> None:
        # Not ReplayBuffer's own constructor: it allocates its arrays.
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs=n_envs)
        self.buffer_size = max(buffer_size // n_envs, 1)
        self.optimize_memory_usage = optimize_memory_usage
        self.handle_timeout_termination = handle_timeout_termination
        self.n_steps = n_steps
        self.gamma = gamma
        self._shapes: dict[str, tuple[int, ...]] = (
            dict(self.obs_shape) if isinstance(self.obs_shape, dict) else {"obs": tuple(self.obs_shape)}
        )
        self._single = not isinstance(self.obs_shape, dict)
        self._dtypes = {name: _torch_dtype(self._space(name).dtype) for name in self._shapes}
        self._action_dtype = self._maybe_cast_dtype(action_space.dtype)
        self._frame_stack = frame_stack
        self._stacks: dict[str, _Stack] = {}
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
        """One transition per environment. `infos` are SB3's list of dicts, or gymnasium's dict of arrays."""
        timeouts = np.zeros(self.n_envs, bool)
        if self.handle_timeout_termination:
            timeouts = _timeouts(infos, self.n_envs)
        rows = (
            self._rows(obs),
            np.asarray(action, self._action_dtype).reshape(self.n_envs, self.action_dim),
            np.asarray(reward, np.float32).reshape(self.n_envs),
            self._rows(next_obs),
            np.asarray(done).astype(bool).reshape(self.n_envs) & ~timeouts,
            timeouts,
        )
        if self._buffer is None:
            self._stacks = {
                name: self._recognise(name, rows[0][name], rows[3][name]) for name in self._shapes
            }
            self._buffer = self._build()
        while True:
            try:
                self._buffer.add(*rows)
                break
            except _C.FrameStackError:
                coarser = {name: stack.coarser() for name, stack in self._stacks.items()}
                if self._frame_stack != "auto" or coarser == self._stacks:
                    raise
                self._stacks = coarser  # the guess was wrong: these are fewer frames
                self._rebuild()
        self.pos += 1
        if self.pos == self.buffer_size:
            self.full = True
            self.pos = 0

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

    def _rows(self, obs: np.ndarray | dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {"obs": obs} if self._single else obs
        return {  # cast to the space's dtype, as SB3 does where environments do not keep to it
            name: np.asarray(given[name], self._space(name).dtype).reshape(self.n_envs, *shape)
            for name, shape in self._shapes.items()
        }

    # ---- frame stacks ----

    def _recognise(self, name: str, obs: np.ndarray, next_obs: np.ndarray) -> "_Stack":
        """The finest stack whose frames slide from obs to next_obs."""
        shape = self._shapes[name]
        image = len(shape) == 3 and self._dtypes[name] == torch.uint8
        channels_last = image and shape[-1] < shape[0]
        if isinstance(self._frame_stack, Mapping):
            return _Stack(shape, self._frame_stack.get(name, 1), channels_last)
        if self._frame_stack != "auto":
            return _Stack(shape, self._frame_stack if image or self._single else 1, channels_last)
        for last in (channels_last, not channels_last) if image else ():  # the shorter side first
            stack = _Stack(shape, shape[-1 if last else 0], last)
            while stack.frames > 1:
                if stack.slides(obs, next_obs):
                    return stack
                stack = stack.coarser()
        return _Stack(shape, 1, channels_last)

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
        """Uniform over what is stored; the same rows as SB3 draws from the same numpy random state."""
        upper = self.buffer_size if self.full else self.pos
        if self._buffer is None and upper > 0:
            return self._zeros().sample(batch_size, env)
        ids = self._ids(*self._draw(upper, batch_size))
        while (lost := ids < 0).any():
            n = int(lost.sum())
            ids[lost] = self._ids(*self._draw(upper, n))
        return self._samples(ids, env)

    def _get_samples(  # type: ignore[override]
        self, batch_inds: np.ndarray, env: VecNormalize | None = None
    ) -> ReplayBufferSamples | DictReplayBufferSamples:
        ids = self._ids(batch_inds, np.random.randint(0, self.n_envs, size=len(batch_inds)))  # noqa: NPY002
        if (ids < 0).any():
            raise IndexError(f"positions {np.asarray(batch_inds)[ids < 0]} hold no transition")
        return self._samples(ids, env)

    def _draw(self, upper: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(positions, environments) from SB3's source of randomness, numpy's global one, in SB3's order."""
        positions = np.random.randint(0, upper, size=n)  # noqa: NPY002
        return positions, np.random.randint(0, self.n_envs, size=n)  # noqa: NPY002

    def _ids(self, positions: np.ndarray, envs: np.ndarray) -> np.ndarray:
        """Ids of the transitions at these positions of the environments' rings, -1 where there are none."""
        rows = np.asarray(envs, np.int64) * self.buffer_size + np.asarray(positions, np.int64)
        return self.buffer._core.ids_in_rows(rows)

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
        channels_last = any(stack.channels_last for stack in self._stacks.values())
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
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
        self._buffer = None

    # ---- SB3's arrays, for those who look at them: copies, rebuilt on every access ----

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
        blank.add(obs, obs, np.zeros((self.n_envs, self.action_dim)), zero, zero, [{}] * self.n_envs)
        return blank

    def _column(self, part: Callable[[Batch], Tensor]) -> np.ndarray:
        """[buffer_size, n_envs, ...], zeros where nothing is stored."""
        if self._buffer is None:
            row = self._zeros()._column(part)
            return np.zeros((self.buffer_size, *row.shape[1:]), row.dtype)
        positions, envs = np.divmod(np.arange(self.buffer_size * self.n_envs), self.n_envs)
        ids = self._ids(positions, envs)
        held = part(self._batch(ids[ids >= 0], 1)).numpy()
        table = np.zeros((len(ids), *held.shape[1:]), held.dtype)
        table[ids >= 0] = held
        return table.reshape(self.buffer_size, self.n_envs, *held.shape[1:])

    def _observation_column(self, which: str) -> np.ndarray | dict[str, np.ndarray]:
        columns = {
            name: self._column(lambda batch, name=name: self._to_given(getattr(batch, which))[name])  # type: ignore[misc]
            for name in self._shapes
        }
        return columns["obs"] if self._single else columns

    @property
    def observations(self) -> np.ndarray | dict[str, np.ndarray]:  # type: ignore[override]
        return self._observation_column("obs")

    @property
    def next_observations(self) -> np.ndarray | dict[str, np.ndarray]:  # type: ignore[override]
        return self._observation_column("next_obs")

    @property
    def actions(self) -> np.ndarray:  # type: ignore[override]
        return self._column(lambda batch: batch.action)

    @property
    def rewards(self) -> np.ndarray:  # type: ignore[override]
        return self._column(lambda batch: batch.reward)

    @property
    def dones(self) -> np.ndarray:  # type: ignore[override]
        """Setting elements of this array terminates those transitions, or takes back their end."""
        dones = self._column(lambda batch: (batch.terminated | batch.truncated).float()).view(_Dones)
        dones.owner = self
        return dones

    def _set_done(self, which: np.ndarray, done: np.ndarray) -> None:
        """which: flat indices into [buffer_size, n_envs]."""
        positions, envs = np.divmod(which, self.n_envs)
        ids = self._ids(positions, envs)
        self.buffer.set_terminated(ids[ids >= 0], done[ids >= 0])

    @property
    def timeouts(self) -> np.ndarray:  # type: ignore[override]
        return self._column(lambda batch: batch.truncated.float())


class _Dones(np.ndarray):
    """SB3's array of ends: what is written to it reaches the buffer."""

    owner: FastReplayBuffer | None = None  # of the whole array, not of its slices

    def __setitem__(self, key: Any, value: Any) -> None:
        before = np.array(self)
        super().__setitem__(key, value)
        if self.owner is not None:
            after = np.asarray(self)
            which = np.flatnonzero(before != after)
            self.owner._set_done(which, after.reshape(-1)[which] != 0)


@dataclass(frozen=True)
class _Stack:
    """A guess how an observation is made of frames."""

    shape: tuple[int, ...]
    frames: int
    channels_last: bool

    def coarser(self) -> "_Stack":
        """With the next smaller number of frames that divides the channels; itself if there is none."""
        stacked = self.shape[-1 if self.channels_last else 0]
        smaller = [n for n in range(1, self.frames) if stacked % n == 0]
        return replace(self, frames=smaller[-1]) if smaller else self

    def slides(self, obs: np.ndarray, next_obs: np.ndarray) -> bool:
        channels = self.shape[-1 if self.channels_last else 0] // self.frames
        if self.channels_last:
            return np.array_equal(obs[..., channels:], next_obs[..., :-channels])
        return np.array_equal(obs[:, channels:], next_obs[:, :-channels])


def _timeouts(infos: Infos, n_envs: int) -> np.ndarray:
    """Which environments were truncated, from SB3's list of infos or from gymnasium's dict of arrays."""
    if isinstance(infos, Mapping):
        truncated = infos.get("TimeLimit.truncated", np.zeros(n_envs, bool))
        return np.asarray(truncated).astype(bool).reshape(n_envs)
    return np.array([bool(info.get("TimeLimit.truncated", False)) for info in infos])


def _normalized(observations: dict[str, Tensor], env: VecNormalize) -> dict[str, Tensor]:
    arrays = {name: value.numpy() for name, value in observations.items()}
    if "obs" in arrays and not isinstance(env.observation_space, spaces.Dict):
        return {"obs": torch.as_tensor(env.normalize_obs(arrays["obs"]))}
    normalized = env.normalize_obs(arrays)
    assert isinstance(normalized, dict)
    return {name: torch.as_tensor(value) for name, value in normalized.items()}


def _torch_dtype(dtype: Any) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
