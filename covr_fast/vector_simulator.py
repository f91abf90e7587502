"""Gymnasium vector environments of a user as a simulator for `envs.PixelEnvs`.

A vector environment steps all its environments at once. Where an episode ends within a decision, or a step
was only the reset, that environment is out of step with the others from then on. So each has its own count of
the steps that are left of its decision, and a call returns as soon as some decisions are over: those
environments get their next actions, the others continue. Transitions are those of single environments, to the
step.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .entry_point import blamed
from .errors import UserError
from .gymnasium_simulator import (
    Make,
    OwnThread,
    Spaces,
    as_reward,
    autoreset_mode,
    check_observation,
    closing,
    made,
)
from .opengl import DRAWING

if TYPE_CHECKING:
    from .env_config import EnvConfig


class Outcome(NamedTuple):
    """The decisions of a simulator's environments that are over.

    Attributes:
        rows: int64[m], the environments, by their place in the simulator.
        reward: float32[m], summed over the steps of the decision.
        terminated, truncated: bool[m].
        last: uint8[m, H, W, 3], the frames after the decisions.
        first: uint8[k, H, W, 3], the first frames of the next episodes, of the rows whose episode has ended.
        steps: environment steps that were simulated for it, in any row.
    """

    rows: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    last: np.ndarray
    first: np.ndarray
    steps: int


class VectorSimulator:
    """A vector environment in any of gymnasium's autoreset modes.

    The last frame of an episode is what its last step returned (NextStep, Disabled) or `infos["final_obs"]`
    (SameStep). The first frame of the next is what the step after the end (NextStep), the last step itself
    (SameStep) or a reset of that environment (Disabled) returned.
    """

    def __init__(self, make: Make, spaces: Spaces, config: "EnvConfig", seed: int) -> None:
        """Makes config.batch_size environments. The seed, that of the first one, is given to the first reset,
        and none later."""
        from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

        self._spaces = spaces
        self._seed: int | None = seed
        self._repeat, self._longest = config.action_repeat, config.max_episode_steps
        self._call, num_envs = OwnThread(config.id), config.batch_size
        self._env: Any = None
        try:
            self._env = self._call(lambda: made(make, num_envs, f"{self._call.name}: make()"))
        except BaseException:
            self.close()
            raise
        mode = autoreset_mode(self._env.metadata["autoreset_mode"])
        self._same_step, self._next_step = mode is AutoresetMode.SAME_STEP, mode is AutoresetMode.NEXT_STEP
        self._resets_rows = mode is AutoresetMode.DISABLED or isinstance(
            self._env.unwrapped, (SyncVectorEnv, AsyncVectorEnv)
        )
        self._actions = np.zeros((num_envs, len(spaces.low)), self._env.single_action_space.dtype)
        self._reward = np.zeros(num_envs, np.float32)
        self._terminated, self._truncated = np.zeros(num_envs, bool), np.zeros(num_envs, bool)
        self._last: np.ndarray | None = None
        self._left = np.zeros(num_envs, np.int64)  # steps of the decision
        self._age = np.zeros(num_envs, np.int64)  # steps of the episode
        self._over = np.zeros(num_envs, bool)  # the next step is only the reset

    def reset(self) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins an episode in every environment. Returns frames uint8[n, H, W, 3] and an empty dict."""
        self._age[:], self._over[:] = 0, False
        seed, self._seed = self._seed, None
        return self._call(lambda: self._frames(self._reset(seed=seed))), {}

    def decide(self, action: np.ndarray, rows: np.ndarray) -> Outcome:
        """Takes actions float[m, A] for the environments int[m], which wait for one: at first all, then those
        of the last outcome. Steps until some decisions are over."""
        bounded = action.clip(self._spaces.low, self._spaces.high)  # scaling may round beyond a bound
        self._actions[rows] = bounded.astype(self._actions.dtype)
        self._left[rows], self._reward[rows] = self._repeat, 0
        return self._call(self._advance)

    def close(self) -> None:
        """Closes the environments. If they cannot be closed, that is a warning."""
        if self._env is not None:
            self._call(self._close)
        self._call.shutdown()

    def _close(self) -> None:
        with closing(self._call.name):
            self._env.close()

    def _advance(self) -> Outcome:
        steps = 0
        while True:
            begun = self._over  # whose step is only the reset
            moved = ~begun
            with blamed(f"{self._call.name}: its step()"):
                observation, reward, terminated, truncated, infos = self._env.step(self._actions.copy())
            terminated, truncated = self._flags(terminated), self._flags(truncated)
            steps += int(moved.sum())
            self._reward[moved] += as_reward(reward, moved.shape, self._call.name)[moved]
            self._left[moved] -= 1
            self._age[moved] += 1
            ended = moved & (terminated | truncated)
            cut = moved & ~ended & (self._age >= self._longest)
            self._terminated[moved] = terminated[moved]
            self._truncated[moved] = (truncated | cut)[moved]
            decided = moved & (self._left == 0)
            if not (begun | ended | cut | decided).any():
                continue
            first = self._frames(observation)
            self._keep_last(first, moved, ended, infos)
            to_reset = cut if self._same_step or self._next_step else cut | ended
            if to_reset.any():
                first[to_reset] = self._frames(self._reset_rows(to_reset))[to_reset]
            self._over = ended if self._next_step else np.zeros_like(ended)
            begun = begun | to_reset | (ended & ~self._over)
            self._age[begun] = 0
            over = begun | (decided & ~self._over)
            if over.any():
                return self._outcome(over, begun, first, steps)

    def _outcome(self, over: np.ndarray, begun: np.ndarray, first: np.ndarray, steps: int) -> Outcome:
        assert self._last is not None
        return Outcome(
            np.flatnonzero(over),
            self._reward[over],
            self._terminated[over],
            self._truncated[over],
            self._last[over],
            first[begun],
            steps,
        )

    def _keep_last(
        self, frames: np.ndarray, moved: np.ndarray, ended: np.ndarray, infos: dict[str, Any]
    ) -> None:
        """Keeps the frames after this step, which may be the last ones of their decisions."""
        if self._last is None:
            self._last = np.zeros_like(frames)
        self._last[moved] = frames[moved]
        if self._same_step and ended.any():
            if "final_obs" not in infos:
                raise UserError(
                    f"{self._call.name} resets in the step that ends an episode (SameStep), but its infos "
                    "hold no 'final_obs': add the last observations there, or use another autoreset_mode"
                )
            for row in np.flatnonzero(ended):
                last = np.asarray(infos["final_obs"][row])
                check_observation(last, self._last.shape[1:], self._call.name)
                self._last[row] = last

    def _flags(self, given: Any) -> np.ndarray:
        """bool[n], which environments a step has terminated or truncated."""
        flags = np.asarray(given, bool)
        if not flags.ndim:  # one for all
            flags = np.full_like(self._over, flags)
        if flags.shape != self._over.shape:
            raise UserError(
                f"{self._call.name}: its step() returned terminated or truncated of shape {flags.shape}: "
                f"they must be bool {self._over.shape}"
            )
        return flags

    def _reset_rows(self, rows: np.ndarray) -> Any:
        """The observations after a reset of the environments bool[n] only."""
        if not self._resets_rows:
            raise UserError(
                f"{self._call.name} has not ended an episode within env.max_episode_steps={self._longest} "
                "steps, and cannot be reset by one: let it truncate its episodes earlier, or raise "
                "env.max_episode_steps"
            )
        return self._reset(options={"reset_mask": rows.copy()})

    def _reset(self, **options: Any) -> Any:
        with blamed(f"{self._call.name}: its reset()"):
            observation, _ = self._env.reset(**options)
        return observation

    def _frames(self, observation: Any) -> np.ndarray:
        """uint8[n, H, W, 3], a copy that may be written into."""
        if self._spaces.frame is not None:
            frames = np.array(observation)
            check_observation(frames, (len(self._over), *self._spaces.frame), self._call.name)
            return frames
        with DRAWING, blamed(f"{self._call.name}: its render()"):
            frames = np.stack([np.asarray(frame) for frame in self._env.render()])
        expected = (len(self._over), *frames.shape[1:]) if self._last is None else self._last.shape
        if frames.shape != expected:
            raise UserError(
                f"{self._call.name}: its render() gave frames {frames.shape} instead of {expected}: there "
                "must be one for each environment, always of the same shape"
            )
        return frames
