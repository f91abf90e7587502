"""Batches of pixel environments, with action repeat and frame stacks.

A simulator resets on the step after the end of an episode: that step ignores its action and returns the first
frame of the next episode with reward 0. Such a row is not a transition, so this module takes it and never
returns it.
"""

import warnings
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from .env_config import EnvConfig
from .errors import UserError
from .opengl import DRAWING, return_memory
from .scalars import as_int
from .seeds import SEEDS
from .tasks import Task, find_task
from .vector_simulator import Outcome, VectorSimulator


class Rows(NamedTuple):
    """The results of one decision in each of n environments: those of a batch. With a vector environment of
    yours, those whose decisions are over.

    Attributes:
        env_ids: int64[n], the environments.
        next_obs: uint8[n, C, H, W], the observation after the action; the last one where the episode ended.
        reward: float32[n], summed over the action repeat.
        terminated: bool[n], the task ended: its last state has no future value.
        truncated: bool[n], the episode was cut off: its last state has a future value.
        obs: uint8[n, C, H, W], the observation for the next action: that of a new episode where one ended,
            else the same as next_obs.
        frames: simulator frames that these rows took.
    """

    env_ids: np.ndarray
    next_obs: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    obs: np.ndarray
    frames: int


class PixelEnvs:
    """Environments stepped in `num_envs / batch_size` batches, each batch in one thread.

    `send` starts a batch and returns at once; `recv` waits for the batch that was sent first. While the
    learner handles one batch, the others simulate. The order of the batches is fixed, so a run depends on its
    seed and never on timing. (EnvPool's asynchronous mode returns rows in the order in which they finish.)

    Call `reset` first. A RuntimeError follows from `send` of a batch that is simulating, `recv` without a
    sent batch, `reset` with one, and any call after `close`.
    """

    def __init__(self, config: EnvConfig, simulators: list[Any], task: Task):
        """`simulators`: one per batch, with EnvPool's Gymnasium interface: reset(), step(action, env_id),
        close() and, where the task's observations contain no frames, render(env_ids) -> uint8[n, H, W, 3]."""
        self.config = config
        self.action_shape = (task.action_dim,)
        self.obs_shape = config.obs_shape
        self._task = task
        self._simulators = simulators
        n = config.num_envs
        self._stacks = np.zeros((n, *config.obs_shape), np.uint8)
        self._drawn: dict[int, np.ndarray] = {}
        self._sent: deque[tuple[int, Future[Rows]]] = deque()
        self._waiting = self.batches()
        """By batch, the environments that wait for a decision, or did before they began to simulate."""
        self._begun = False
        self._closed = False
        self._pool = ThreadPoolExecutor(
            len(simulators), "covr-simulator", initializer=torch.set_num_threads, initargs=(1,)
        )

    def batches(self) -> list[np.ndarray]:
        """The env_ids of each batch, int64[batch_size]."""
        return list(np.arange(self.config.num_envs).reshape(-1, self.config.batch_size))

    def reset(self) -> np.ndarray:
        """Starts an episode in every environment; returns the observations, uint8[num_envs, C, H, W].

        Raises:
            RuntimeError: after close(), or while a batch is simulating.
        """
        self._check_open("reset()")
        if self._sent:
            raise RuntimeError("reset() while a batch is simulating: recv() it first")
        for ids, simulator in zip(self.batches(), self._simulators, strict=True):
            observation, _ = simulator.reset()
            self._start_stacks(ids, self._frames(simulator, observation, np.arange(len(ids))))
        self._begun, self._waiting = True, self.batches()
        return self._stacks.copy()

    def send(self, action: np.ndarray, env_ids: np.ndarray) -> None:
        """Starts simulating one decision for one of batches(); later for the rows that `recv` gave.

        Args:
            action: real numbers [n, A], clipped to [-1, 1].
            env_ids: integers [n], those environments of the batch that wait for a decision, in any order: all
                of them, but for vector environments of a user.

        Raises:
            ValueError: wrong shape or type, an action that is not finite, or env_ids that are no batch.
            RuntimeError: before reset(), after close(), or while this batch is simulating.
        """
        self._check_open("send()")
        if not self._begun:
            raise RuntimeError("send() before reset(): an environment has to be started first")
        ids = self._batch_ids(env_ids)
        batch = int(ids[0]) // self.config.batch_size
        if any(batch == sent for sent, _ in self._sent):
            raise RuntimeError(f"env_ids={ids.tolist()} are simulating: recv() them before the next send()")
        sim_action = np.ascontiguousarray(self._task.to_sim(self._checked_action(action, ids)), np.float32)
        self._sent.append((batch, self._pool.submit(self._advance, sim_action, ids)))

    def recv(self) -> Rows:
        """Waits for the batch that was sent first.

        Raises:
            RuntimeError: no batch was sent, or after close().
            UserError: the environment returned a reward that is not finite.
        """
        self._check_open("recv()")
        if not self._sent:
            raise RuntimeError("recv() without a send()")
        batch, sent = self._sent.popleft()
        rows = sent.result()
        self._waiting[batch] = rows.env_ids
        return rows

    def picture(self, env_id: int) -> np.ndarray:
        """The newest frame of an environment as the simulator drew it, before it is resized and perhaps grey:
        uint8[H, W, 3] of any size. It is that of its `obs`.

        Raises:
            RuntimeError: before reset(), after close(), or while its batch is simulating.
        """
        self._check_open("picture()")
        if not self._begun or any(env_id // self.config.batch_size == batch for batch, _ in self._sent):
            raise RuntimeError(f"picture({env_id}) before reset(), or between send() and recv() of its batch")
        return self._drawn[env_id].copy()

    def close(self) -> None:
        """Waits for batches that are simulating, and frees the simulators and their threads."""
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._sent.clear()
        # Not replaced: references to make_env's frame and its list may remain after EnvPool's import.
        with DRAWING:
            while self._simulators:
                self._simulators.pop().close()
        return_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self, what: str) -> None:
        if self._closed:
            raise RuntimeError(f"{what} after close(): make_env() builds new environments")

    def _batch_ids(self, env_ids: np.ndarray) -> np.ndarray:
        """env_ids as int64[n], checked to be the rows that wait in a batch: EnvPool does not check them."""
        ids = np.asarray(env_ids)
        if not np.issubdtype(ids.dtype, np.integer) or ids.ndim != 1:
            raise ValueError(
                f"env_ids has shape {ids.shape} and dtype {ids.dtype}, expected integers "
                f"[{self.config.batch_size}]: send one of batches()"
            )
        ids = ids.astype(np.int64)
        if not any(np.array_equal(np.sort(ids), np.sort(waiting)) for waiting in self._waiting):
            raise ValueError(
                f"env_ids={ids.tolist()} are not one batch: send one of batches(), each env_id of it once, "
                f"such as {self._waiting[0].tolist()}, or the env_ids that recv() gave"
            )
        return ids

    def _checked_action(self, action: np.ndarray, ids: np.ndarray) -> np.ndarray:
        action = np.asarray(action)
        expected = (len(ids), *self.action_shape)
        if action.shape != expected:
            raise ValueError(f"action has shape {action.shape}, expected {expected}")
        if not (np.issubdtype(action.dtype, np.floating) or np.issubdtype(action.dtype, np.integer)):
            raise ValueError(f"action has dtype {action.dtype}, expected real numbers such as float32")
        finite = np.isfinite(action).all(1)
        if not finite.all():
            raise ValueError(
                f"action holds NaN or infinity for env_ids {ids[~finite].tolist()}: has the policy diverged?"
            )
        return action.clip(-1, 1)

    def _advance(self, action: np.ndarray, ids: np.ndarray) -> Rows:
        batch = int(ids[0]) // self.config.batch_size
        simulator, offset = self._simulators[batch], batch * self.config.batch_size
        if isinstance(simulator, VectorSimulator):
            outcome = simulator.decide(action, ids - offset)
        else:
            outcome = self._decide(simulator, action, ids - offset)
        ids, reward = outcome.rows + offset, outcome.reward
        if not np.isfinite(reward).all():
            bad = ids[~np.isfinite(reward)].tolist()
            raise UserError(
                f"environment {self.config.id} returned a reward that is not finite (env_ids {bad})"
            )
        c = self.config.channels
        self._stacks[ids, :-c] = self._stacks[ids, c:]
        self._stacks[ids, -c:] = self._resize(outcome.last)
        self._drawn.update(zip(ids.tolist(), outcome.last, strict=True))
        next_obs = self._stacks[ids]
        obs = next_obs
        done = outcome.terminated | outcome.truncated
        if done.any():
            self._start_stacks(ids[done], outcome.first)
            obs = self._stacks[ids]
        truncated = outcome.truncated & ~outcome.terminated
        return Rows(ids, next_obs, reward, outcome.terminated, truncated, obs, outcome.steps)

    def _decide(self, simulator: Any, action: np.ndarray, rows: np.ndarray) -> Outcome:
        """Steps these environments of a simulator to the end of their decisions, and resets those whose
        episode has ended."""
        n = len(rows)
        reward = np.zeros(n, np.float32)
        terminated, truncated = np.zeros(n, bool), np.zeros(n, bool)
        newest: np.ndarray | None = None
        alive = np.arange(n)
        steps = 0
        for _ in range(self.config.action_repeat):
            observation, r, term, trunc, _info = simulator.step(action[alive], rows[alive].astype(np.int32))
            steps += len(alive)
            if self._task.to_rgb:
                if newest is None:
                    newest = np.empty((n, *observation.shape[1:]), observation.dtype)
                newest[alive] = observation
            reward[alive] += r
            terminated[alive], truncated[alive] = term, trunc
            alive = alive[~(term | trunc)]
            if len(alive) == 0:
                break
        # Rendered frames are rendered once for all repeats; an ended episode still shows its last state.
        last = first = self._frames(simulator, newest, rows)
        done = terminated | truncated
        if done.any():
            # The reset row belongs to no transition; it starts the frame stack of the next episode.
            over = rows[done].astype(np.int32)
            observation, *_ = simulator.step(action[done], over)
            first = self._frames(simulator, observation, over)
        return Outcome(rows, reward, terminated, truncated, last, first, steps)

    def _frames(self, simulator: Any, observation: Any, rows: np.ndarray) -> np.ndarray:
        """The newest frames of these rows of a simulator, uint8[n, H, W, 3]."""
        if self._task.to_rgb:
            return self._task.to_rgb(observation)
        with DRAWING:
            rgb: np.ndarray = simulator.render(rows.astype(np.int32))
        return rgb

    def _start_stacks(self, ids: np.ndarray, rgb: np.ndarray) -> None:
        """Fills the stacks of these environments with their first frames uint8[n, H, W, 3]."""
        self._stacks[ids] = np.tile(self._resize(rgb), (1, self.config.frame_stack, 1, 1))
        self._drawn.update(zip(ids.tolist(), rgb, strict=True))

    def _resize(self, rgb: np.ndarray) -> np.ndarray:
        """uint8[n, H0, W0, 3] -> uint8[n, channels, height, width], antialiased."""
        size = (self.config.height, self.config.width)
        frames = torch.from_numpy(np.ascontiguousarray(rgb)).permute(0, 3, 1, 2)
        if frames.shape[-2:] != size:
            frames = torch.nn.functional.interpolate(frames, size=size, mode="bilinear", antialias=True)
        if self.config.grayscale:
            frames = luma(frames)
        return frames.contiguous().numpy()


def luma(rgb: torch.Tensor) -> torch.Tensor:
    """uint8[n, 3, H, W] -> uint8[n, 1, H, W], the weighted mean of the colours by ITU-R BT.601."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float32, device=rgb.device)
    return torch.einsum("nchw,c->nhw", rgb.float(), weights).round().to(torch.uint8)[:, None]


def make_env(config: EnvConfig, *, large: bool = False) -> PixelEnvs:
    """Builds config.num_envs environments.

    Args:
        large: of a task that has `simulate_large`, take those simulators: `picture` is large then, and
            observations are made of it, so they are no agent's. See `large_pictures.py`.

    Raises:
        UserError: unknown id, discrete or unbounded actions, no pixels, sizes that do not fit together,
            DMControl on a machine that cannot render, or CARLA without its client or a server.
    """
    _check(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # gymnasium's about the precision of EnvPool's bounds
        task = find_task(config)
        if large and task.simulate_large:
            task = replace(task, simulate=task.simulate_large, to_rgb=None)
        simulators: list[Any] = []
        try:
            for first in range(0, config.num_envs, config.batch_size):
                simulators.append(task.simulate(config.seed + first))
        except BaseException:  # what a simulator holds (a CARLA server, a window) has to be free again
            for simulator in simulators:
                simulator.close()
            raise
    return PixelEnvs(config, simulators, task)


def _check(config: EnvConfig) -> None:
    """Raises UserError for sizes and seeds that EnvPool would misread, or that do not fit together."""
    for name, least in {
        "num_envs": 1, "batch_size": 1, "num_threads": 1, "height": 1, "width": 1, "frame_stack": 1,
        "action_repeat": 1, "max_episode_steps": 1, "seed": 0,
    }.items():  # fmt: skip
        value = getattr(config, name)
        try:
            as_int(value, f"env.{name}")
        except TypeError as error:
            raise UserError(str(error)) from None
        if value < least:
            raise UserError(f"env.{name}={value} must be at least {least}")
    if config.num_envs % config.batch_size:
        raise UserError(
            f"env.num_envs={config.num_envs} is not a multiple of env.batch_size={config.batch_size}"
        )
    if config.seed + config.num_envs > SEEDS + 1:
        raise UserError(
            f"env.seed={config.seed} leaves no 32-bit seeds for {config.num_envs} environments: "
            f"it must be at most {SEEDS + 1 - config.num_envs}"
        )
