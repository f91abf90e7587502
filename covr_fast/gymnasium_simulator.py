"""Gymnasium environments of a user as a simulator for `envs.PixelEnvs`."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .errors import UserError

if TYPE_CHECKING:
    import gymnasium

    Make = Callable[[], gymnasium.Env[Any, Any]]

T = TypeVar("T")


@dataclass(frozen=True)
class Spaces:
    """What is known of an environment before it is used."""

    low: np.ndarray
    """float64[A], the lower bounds of its actions."""
    high: np.ndarray
    """float64[A], the upper bounds."""
    pixels: bool
    """Whether its observations are its frames. Else they are rendered."""


def inspect(make: "Make") -> Spaces:
    """Makes one environment, looks at its spaces and its first frame, and closes it.

    Raises:
        UserError: `make` makes no environment, its actions are no bounded Box, or it gives no frames.
    """
    import gymnasium

    env = make()
    if not isinstance(env, gymnasium.Env):
        raise _refused(f"makes a {type(env).__name__}", "it must make one gymnasium.Env")
    try:
        low, high = _bounds(getattr(env, "action_space", None))
        observations = getattr(env, "observation_space", None)
        pixels = _shows_frames(observations)
        if not pixels and env.render_mode != "rgb_array":
            raise _refused(
                f"makes an environment without frames: its observations are {observations}, its "
                f"render_mode is {env.render_mode!r}",
                "give it uint8 observations [H, W, 3], or render_mode='rgb_array'",
            )
        begun: Any = env.reset(seed=0)
        if not isinstance(begun, tuple) or len(begun) != 2:  # as in the older Gym
            got = f"{len(begun)} values" if isinstance(begun, tuple) else f"a {type(begun).__name__}"
            raise _refused(
                f"makes an environment whose reset() returns {got}", "it must return observation, info"
            )
        observation = begun[0]
        frame: Any = observation if pixels else env.render()
        if not (isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and _is_rgb(frame.shape)):
            got = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
            what = "observation" if pixels else "render()"
            raise _refused(
                f"makes an environment whose {what} is {got}", "it must be a numpy uint8 [H, W, 3]"
            )
        return Spaces(low, high, pixels)
    finally:
        env.close()


def _bounds(actions: Any) -> tuple[np.ndarray, np.ndarray]:
    """float64[A] low and high of an action space."""
    from gymnasium.spaces import Box

    what = f"makes an environment with actions {actions}"
    if not isinstance(actions, Box) or not np.issubdtype(actions.dtype, np.floating):
        raise _refused(what, "COVR's actor and its priors are continuous: give it a Box of floats")
    if len(actions.shape) != 1 or not actions.shape[0]:
        raise _refused(what, "give it a Box of shape [A]")
    if not actions.is_bounded():
        raise _refused(what, "[-1, 1] cannot be scaled to them: give its Box finite low and high")
    return actions.low.astype(np.float64), actions.high.astype(np.float64)


def _shows_frames(observations: Any) -> bool:
    return getattr(observations, "dtype", None) == np.uint8 and _is_rgb(observations.shape)


def _is_rgb(shape: tuple[int, ...] | None) -> bool:
    return shape is not None and len(shape) == 3 and shape[2] == 3


def _refused(what: str, remedy: str) -> UserError:
    return UserError(f"register_task: make() {what}: {remedy}")


class GymnasiumSimulator:
    """Environments with EnvPool's interface: the step after the end of an episode is the reset.

    All calls of the environments come from one thread, because OpenGL contexts, among other things, belong to
    the thread that made them.
    """

    def __init__(
        self, make: "Make", spaces: Spaces, num_envs: int, *, seed: int, max_episode_steps: int
    ) -> None:
        """Makes the environments. Environment i gets seed + i in its first reset, and none later."""
        from gymnasium.wrappers import TimeLimit

        self._spaces = spaces
        self._seeds: list[int | None] = [seed + i for i in range(num_envs)]
        self._over = np.zeros(num_envs, bool)
        self._thread = ThreadPoolExecutor(1, "covr-gymnasium")
        self._envs: list[gymnasium.Env[Any, Any]] = []

        def build() -> None:
            for _ in range(num_envs):
                env = make()
                if any(env.unwrapped is other.unwrapped for other in self._envs):
                    raise _refused("makes the same environment twice", "it must make a new one each time")
                self._envs.append(TimeLimit(env, max_episode_steps))

        try:
            self._call(build)
        except BaseException:
            self.close()
            raise

    def reset(self) -> tuple[np.ndarray | None, dict[str, Any]]:
        """Begins an episode in every environment."""
        return self._frames(self._call(lambda: [self._begin(i) for i in range(len(self._envs))])), {}

    def step(
        self, action: np.ndarray, env_id: np.ndarray
    ) -> tuple[np.ndarray | None, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Steps the environments of int[n] with actions float[n, A]; one whose episode has ended ignores its
        action and begins the next, with reward 0.

        Returns:
            Frames uint8[n, H, W, 3] (None if they are rendered), reward float32[n], terminated bool[n],
            truncated bool[n], and an empty dict.
        """
        rows = self._call(lambda: [self._step(i, a) for i, a in zip(env_id.tolist(), action, strict=True)])
        observations, reward, terminated, truncated = zip(*rows, strict=True)
        return (
            self._frames(list(observations)),
            np.array(reward, np.float32),
            np.array(terminated, bool),
            np.array(truncated, bool),
            {},
        )

    def render(self, env_ids: np.ndarray) -> np.ndarray:
        """uint8[n, H, W, 3], the present frames of the environments int[n]."""
        return self._call(lambda: np.stack([np.asarray(self._envs[i].render()) for i in env_ids.tolist()]))

    def close(self) -> None:
        """Closes the environments."""
        self._call(self._close_all)
        self._thread.shutdown()

    def _close_all(self) -> None:
        for env in self._envs:
            env.close()

    def _call(self, work: Callable[[], T]) -> T:
        return self._thread.submit(work).result()

    def _begin(self, i: int) -> Any:
        observation, _ = self._envs[i].reset(seed=self._seeds[i])
        self._seeds[i], self._over[i] = None, False
        return observation

    def _step(self, i: int, action: np.ndarray) -> tuple[Any, float, bool, bool]:
        if self._over[i]:
            return self._begin(i), 0.0, False, False
        env, spaces = self._envs[i], self._spaces
        # The scaled action may lie beyond a bound by a rounding error.
        bounded = action.clip(spaces.low, spaces.high).astype(env.action_space.dtype)
        observation, reward, terminated, truncated, _ = env.step(bounded)
        self._over[i] = terminated or truncated
        return observation, float(reward), terminated, truncated

    def _frames(self, observations: list[Any]) -> np.ndarray | None:
        return np.stack(observations) if self._spaces.pixels else None
