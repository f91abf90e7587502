"""Batches of pixel environments from EnvPool: action repeat, frame stacks, and no reset row ever leaves here.

EnvPool resets on the step after an episode's end: that step ignores its action and returns the first frame
of the next episode with reward 0. Such a row is not a transition, so it is taken inside this module.
"""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from .errors import UserError, unknown


@dataclass
class EnvConfig:
    """Which environment, how many, and what the agent sees of it."""

    id: str = "CarRacing-v3"
    """EnvPool id of an environment with a continuous action space."""
    num_envs: int = 16
    """Environments simulated in all."""
    batch_size: int = 8
    """Environments stepped together; the other batches simulate meanwhile. Equal to num_envs: no overlap."""
    num_threads: int = 1
    """Simulator threads per batch."""
    height: int = 84
    """Frame height in pixels, after resizing."""
    width: int = 84
    """Frame width in pixels, after resizing."""
    grayscale: bool = False
    """One luma channel instead of RGB."""
    frame_stack: int = 3
    """Frames stacked along the channels, oldest first."""
    action_repeat: int = 4
    """Simulator frames per decision; their rewards are summed."""
    max_episode_steps: int = 1000
    """Simulator frames after which an episode is truncated."""
    seed: int = 0
    """Seed of the first environment; the others count on from it. Training adds 10,000 per run seed,
    and leaps over the seeds of evaluations."""

    @property
    def channels(self) -> int:
        return 1 if self.grayscale else 3

    @property
    def obs_shape(self) -> tuple[int, int, int]:
        """Shape of a stacked observation, [frame_stack * channels, height, width]."""
        return (self.frame_stack * self.channels, self.height, self.width)


class Rows(NamedTuple):
    """What one batch of n environments returned for one decision each.

    Attributes:
        env_ids: int64[n], which environments these are.
        next_obs: uint8[n, C, H, W], what the action led to: the last observation where the episode ended.
        reward: float32[n], summed over the action repeat.
        terminated: bool[n], the task ended: nothing follows.
        truncated: bool[n], the episode was cut off, and its last state has a future value.
        obs: uint8[n, C, H, W], what to act on next: the first observation of the next episode where one
            ended, else the same as next_obs.
        frames: simulator frames that these rows took.
    """

    env_ids: np.ndarray
    next_obs: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    obs: np.ndarray
    frames: int


class Simulator(Protocol):
    """The part of EnvPool's gymnasium interface that is used here."""

    def reset(self) -> tuple[np.ndarray, dict[str, Any]]: ...

    def step(
        self, action: np.ndarray, env_id: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]: ...


@dataclass(frozen=True)
class Task:
    """How an environment's actions and frames map to the agent's."""

    action_dim: int
    to_sim: Callable[[np.ndarray], np.ndarray]
    to_rgb: Callable[[np.ndarray], np.ndarray]
    """[n, ...] simulator observation -> uint8[n, H, W, 3] newest frame."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of EnvPool."""


def _car_racing_action(action: np.ndarray) -> np.ndarray:
    """(steering, signed gas/brake) in [-1, 1]^2 -> (steering, gas, brake)."""
    steer, pedal = action[:, 0], action[:, 1]
    return np.stack([steer, np.maximum(pedal, 0), np.maximum(-pedal, 0)], axis=1)


# The lowest 12 rows of CarRacing's 96 are the instrument panel, which the view above makes redundant.
_CAR_RACING_VIEW = 84


def action_labels(config: EnvConfig) -> list[str]:
    """What each of the agent's action dimensions does at -1/+1, for people; one label per dimension."""
    if config.id.startswith("CarRacing-"):
        return ["left/right", "brake/gas"]
    return [f"action {i}" for i in range(_find_task(config).action_dim)]


def _find_task(config: EnvConfig) -> Task:
    """The adapter for config.id, or an error for an environment that cannot be driven from pixels."""
    envpool = _import_envpool()
    known = envpool.list_all_envs()
    if config.id not in known:
        raise unknown("environment env.id", config.id, known)
    if config.id.startswith("CarRacing-"):
        return Task(2, _car_racing_action, lambda obs: obs[:, :_CAR_RACING_VIEW], {})

    options: dict[str, Any] = {}
    spec = envpool.make_spec(config.id)
    if hasattr(spec.config, "from_pixels"):
        options = {
            "from_pixels": True,
            "frame_stack": 1,
            "render_width": config.width,
            "render_height": config.height,
        }
        spec = envpool.make_spec(config.id, **options)
    action, obs = spec.action_space, spec.observation_space
    if not (hasattr(action, "low") and np.issubdtype(action.dtype, np.floating)):
        raise UserError(
            f"env.id={config.id!r} has a discrete action space: COVR's actor and its priors are continuous; "
            "choose an environment with a Box action space, such as CarRacing-v3 or CheetahRun-v1"
        )
    shape = getattr(obs, "shape", None)
    if getattr(obs, "dtype", None) != np.uint8 or shape is None or len(shape) != 3:
        raise UserError(
            f"env.id={config.id!r} does not give pixels (uint8 images): choose a pixel environment"
        )
    low, high = action.low, action.high
    channels_first = shape[0] == 3

    def to_sim(a: np.ndarray) -> np.ndarray:
        return (low + (a + 1) * 0.5 * (high - low)).astype(np.float32)

    def to_rgb(o: np.ndarray) -> np.ndarray:
        return o.transpose(0, 2, 3, 1) if channels_first else o

    return Task(action.shape[0], to_sim, to_rgb, options)


def _import_envpool() -> Any:
    """EnvPool, with the system's OpenGL loaded first.

    The wheel bundles libEGL under a mangled name that MuJoCo's loader does not look for, so DMControl pixels
    fail unless the system's libraries are already in the process.
    """
    for library in ("libOpenGL.so.0", "libEGL.so.1"):
        # Only environments that render through OpenGL need it, and those say so themselves.
        with contextlib.suppress(OSError):
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    try:
        import envpool
    except ImportError as error:
        raise UserError("envpool is not installed: pip install 'covr-fast[train]'") from error
    return envpool


class PixelEnvs:
    """Environments stepped in `num_envs / batch_size` batches, each by a thread of its own.

    `send` starts a batch and returns at once; `recv` waits for the batch that was sent first. While the
    learner handles one batch the others simulate. The order of the batches is fixed, so a run depends on its
    seed alone, never on timing. (EnvPool's own asynchronous mode hands rows out as they arrive.)
    """

    def __init__(self, config: EnvConfig, simulators: list[Simulator], task: Task):
        self.config = config
        self.action_shape = (task.action_dim,)
        self.obs_shape = config.obs_shape
        self._task = task
        self._simulators = simulators
        n = config.num_envs
        self._stacks = np.zeros((n, *config.obs_shape), np.uint8)
        self._sent: deque[Future[Rows]] = deque()
        self._pool = ThreadPoolExecutor(
            len(simulators), "covr-simulator", initializer=torch.set_num_threads, initargs=(1,)
        )

    def batches(self) -> list[np.ndarray]:
        """The env_ids of each batch, int64[batch_size]."""
        return list(np.arange(self.config.num_envs).reshape(-1, self.config.batch_size))

    def reset(self) -> np.ndarray:
        """Starts every environment anew and returns uint8[num_envs, C, H, W]. Only while nothing is sent."""
        if self._sent:
            raise RuntimeError("reset() while a batch is simulating: recv() it first")
        for ids, simulator in zip(self.batches(), self._simulators, strict=True):
            frames, _ = simulator.reset()
            self._start_stacks(ids, self._resize(self._task.to_rgb(frames)))
        return self._stacks.copy()

    def send(self, action: np.ndarray, env_ids: np.ndarray) -> None:
        """Starts simulating one decision, action float[batch_size, A] in [-1, 1], of one of batches()."""
        if action.shape != (len(env_ids), *self.action_shape):
            raise ValueError(
                f"action has shape {action.shape}, expected {(len(env_ids), *self.action_shape)}"
            )
        sim_action = np.ascontiguousarray(self._task.to_sim(np.clip(action, -1, 1)), np.float32)
        self._sent.append(self._pool.submit(self._advance, sim_action, np.asarray(env_ids)))

    def recv(self) -> Rows:
        """Waits for the batch that was sent first."""
        if not self._sent:
            raise RuntimeError("recv() without a send()")
        return self._sent.popleft().result()

    def close(self) -> None:
        """Waits for what is simulating and ends the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> PixelEnvs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _advance(self, action: np.ndarray, ids: np.ndarray) -> Rows:
        batch = int(ids[0]) // self.config.batch_size
        simulator, first = self._simulators[batch], batch * self.config.batch_size
        n = len(ids)
        reward = np.zeros(n, np.float32)
        terminated, truncated = np.zeros(n, bool), np.zeros(n, bool)
        newest: np.ndarray | None = None
        alive = np.arange(n)
        frames = 0
        for _ in range(self.config.action_repeat):
            frame, r, term, trunc, _info = simulator.step(
                action[alive], (ids[alive] - first).astype(np.int32)
            )
            frames += len(alive)
            if newest is None:
                newest = np.empty((n, *frame.shape[1:]), frame.dtype)
            newest[alive] = frame
            reward[alive] += r
            terminated[alive], truncated[alive] = term, trunc
            alive = alive[~(term | trunc)]
            if len(alive) == 0:
                break
        assert newest is not None
        if not np.isfinite(reward).all():
            bad = ids[~np.isfinite(reward)].tolist()
            raise UserError(
                f"environment {self.config.id} returned a reward that is not finite (env_ids {bad})"
            )
        self._push(ids, self._resize(self._task.to_rgb(newest)))
        next_obs = self._stacks[ids]
        obs = next_obs
        done = terminated | truncated
        if done.any():
            # The reset row: it belongs to no transition, it only starts the next episode's stack.
            frame, *_ = simulator.step(action[done], (ids[done] - first).astype(np.int32))
            self._start_stacks(ids[done], self._resize(self._task.to_rgb(frame)))
            obs = self._stacks[ids]
        return Rows(ids, next_obs, reward, terminated, truncated & ~terminated, obs, frames)

    def _push(self, ids: np.ndarray, frames: np.ndarray) -> None:
        c = self.config.channels
        self._stacks[ids, :-c] = self._stacks[ids, c:]
        self._stacks[ids, -c:] = frames

    def _start_stacks(self, ids: np.ndarray, frames: np.ndarray) -> None:
        self._stacks[ids] = np.tile(frames, (1, self.config.frame_stack, 1, 1))

    def _resize(self, rgb: np.ndarray) -> np.ndarray:
        """uint8[n, H0, W0, 3] -> uint8[n, channels, height, width], antialiased."""
        size = (self.config.height, self.config.width)
        frames = torch.from_numpy(np.ascontiguousarray(rgb)).permute(0, 3, 1, 2)
        if frames.shape[-2:] != size:
            frames = torch.nn.functional.interpolate(frames, size=size, mode="bilinear", antialias=True)
        if self.config.grayscale:
            luma = torch.tensor([0.299, 0.587, 0.114])
            frames = torch.einsum("nchw,c->nhw", frames.float(), luma).round().to(torch.uint8)[:, None]
        return frames.contiguous().numpy()


@contextlib.contextmanager
def _quiet_bounds() -> Iterator[None]:
    """Without what gymnasium says of the precision of EnvPool's box bounds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def make_env(config: EnvConfig) -> PixelEnvs:
    """Builds config.num_envs environments.

    Raises:
        UserError: unknown id, discrete actions, no pixels, or sizes that do not fit together.
    """
    for name in (
        "num_envs", "batch_size", "num_threads", "height", "width", "frame_stack", "action_repeat",
        "max_episode_steps",
    ):  # fmt: skip
        if getattr(config, name) < 1:
            raise UserError(f"env.{name}={getattr(config, name)} must be at least 1")
    if config.num_envs % config.batch_size:
        raise UserError(
            f"env.num_envs={config.num_envs} is not a multiple of env.batch_size={config.batch_size}"
        )
    with _quiet_bounds():
        task = _find_task(config)
    envpool = _import_envpool()
    with _quiet_bounds():
        simulators = [
            envpool.make_gymnasium(
                config.id,
                num_envs=config.batch_size,
                num_threads=config.num_threads,
                seed=config.seed + first,
                max_episode_steps=config.max_episode_steps,
                **task.options,
            )
            for first in range(0, config.num_envs, config.batch_size)
        ]
    return PixelEnvs(config, simulators, task)
