"""Gymnasium environments of a user: what they are, and single ones as a simulator for `envs.PixelEnvs`."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .entry_point import blamed
from .errors import UserError

if TYPE_CHECKING:
    import gymnasium

    from .env_config import EnvConfig

Make = Callable[..., Any]
"""Makes one gymnasium.Env; or, given a number of environments, a gymnasium.vector.VectorEnv of so many."""

T = TypeVar("T")


@dataclass(frozen=True)
class Spaces:
    """What is known of an environment before it is used."""

    low: np.ndarray
    """float64[A], the lower bounds of its actions."""
    high: np.ndarray
    """float64[A], the upper bounds."""
    frame: tuple[int, int, int] | None
    """[H, W, 3], the shape of its observations, which are its frames. None: frames are rendered."""
    vector: bool
    """Whether it is a vector environment."""
    metadata: dict[str, Any]
    """What it says of itself."""

    @property
    def pixels(self) -> bool:
        """Whether its observations are its frames."""
        return self.frame is not None


def makes_vectors(make: Make) -> bool:
    """Whether `make` is to be called with a number of environments: it has a parameter `num_envs`, or one
    that has to be given."""
    try:
        parameters = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):  # of some functions in C nothing is known
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.name == "num_envs" or (p.kind in positional and p.default is p.empty) for p in parameters)


def made(make: Make, num_envs: int, who: str) -> Any:
    """One environment, or a vector environment of `num_envs`.

    Raises:
        UserError: `make` raises, or makes something else. The message begins with `who`.
    """
    import gymnasium

    if not makes_vectors(make):
        with blamed(who):
            env = make()
        if isinstance(env, gymnasium.vector.VectorEnv):
            raise _refused(
                who, f"makes a {type(env).__name__} of any size", "it must take their number: make(num_envs)"
            )
        if not isinstance(env, gymnasium.Env):
            raise _refused(who, f"makes a {type(env).__name__}", "it must make one gymnasium.Env")
        return env
    named = "num_envs" in inspect.signature(make).parameters
    with blamed(who):
        env = make(num_envs=num_envs) if named else make(num_envs)
    if not isinstance(env, gymnasium.vector.VectorEnv):
        raise _refused(
            who,
            f"takes an argument, and makes a {type(env).__name__}",
            "with an argument, the number of environments, it must make a gymnasium.vector.VectorEnv, and "
            "without any one gymnasium.Env",
        )
    if env.num_envs != num_envs:
        raise _refused(who, f"makes {env.num_envs} environments", f"it was asked for {num_envs}")
    return env


def spaces_of(make: Make, who: str) -> Spaces:
    """Makes one environment, looks at its spaces and its first frame, and closes it.

    Raises:
        UserError: `make` makes no environment, its actions are no bounded Box, it gives no frames, or it is
            a vector environment whose episodes begin in a way that is not known. The message begins with
            `who`.
    """
    vector = makes_vectors(make)
    env = made(make, 1, who)
    try:
        low, high = _bounds(getattr(env, "single_action_space" if vector else "action_space", None), who)
        observations = getattr(env, "single_observation_space" if vector else "observation_space", None)
        frame = _frame_shape(observations)
        if frame is None and env.render_mode != "rgb_array":
            raise _refused(
                who,
                f"makes an environment without frames: its observations are {observations}, its "
                f"render_mode is {env.render_mode!r}",
                "give it uint8 observations [H, W, 3], or render_mode='rgb_array'",
            )
        metadata = dict(env.metadata or {})
        if vector:
            _check_autoreset(metadata.get("autoreset_mode"), frame is not None, who)
        with blamed(f"{who}: its reset()"):
            begun: Any = env.reset(seed=0)
        if not isinstance(begun, tuple) or len(begun) != 2:  # as in the older Gym
            got = f"{len(begun)} values" if isinstance(begun, tuple) else f"a {type(begun).__name__}"
            raise _refused(
                who, f"makes an environment whose reset() returns {got}", "it must return observation, info"
            )
        _check_frame(env, begun[0], frame, vector, who)
        return Spaces(low, high, frame, vector, metadata)
    finally:
        with closing(who):
            env.close()


def autoreset_mode(value: Any) -> Any:
    """gymnasium's AutoresetMode for what a vector environment says of itself, or None."""
    from gymnasium.vector import AutoresetMode

    return next((mode for mode in AutoresetMode if value in (mode, mode.value, mode.name)), None)


def _check_autoreset(value: Any, pixels: bool, who: str) -> None:
    from gymnasium.vector import AutoresetMode

    mode = autoreset_mode(value)
    if mode is None:
        raise _refused(
            who,
            f"makes a vector environment whose metadata['autoreset_mode'] is {value!r}",
            "it must be one of gymnasium.vector.AutoresetMode, for episodes begin accordingly",
        )
    if mode is AutoresetMode.SAME_STEP and not pixels:
        raise _refused(
            who,
            "makes a vector environment that resets in the step that ends an episode (SameStep), so the last "
            "frame cannot be rendered",
            "set autoreset_mode='NextStep', or give frames as observations",
        )


def _check_frame(
    env: Any, observation: Any, expected: tuple[int, int, int] | None, vector: bool, who: str
) -> None:
    with blamed(f"{who}: its render()"):
        shown: Any = observation if expected else env.render()
    frame = shown[0] if vector and isinstance(shown, Sequence | np.ndarray) and len(shown) else shown
    if not (isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and _is_rgb(frame.shape)):
        got = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        what = "observation" if expected else "render()"
        raise _refused(
            who, f"makes an environment whose {what} is {got}", "it must be a numpy uint8 [H, W, 3]"
        )
    if expected:
        check_observation(frame, expected, who)


def check_observation(observation: np.ndarray, expected: tuple[int, ...], who: str) -> None:
    """Raises a UserError for frames that are not as their space says: of another shape, which would be
    resized in silence, or of another type, whose values would be cut off."""
    if observation.dtype != np.uint8 or observation.shape != expected:
        raise UserError(
            f"{who}: its observation is {observation.dtype} {observation.shape}, and its observation space "
            f"uint8 {expected}: they must agree"
        )


def as_reward(value: Any, shape: tuple[int, ...], who: str) -> np.ndarray:
    """float32[shape], what a step returned as reward.

    Raises:
        UserError: it is no number, or of another shape.
    """
    try:
        reward = np.asarray(value, np.float32)
        if value is not None and reward.size == np.prod(shape):
            return reward.reshape(shape)
    except (TypeError, ValueError, OverflowError):
        pass
    what = f"{shape[0]} numbers, one for each environment" if shape else "a number"
    got = " ".join(repr(value).split())
    raise UserError(f"{who}: its step() returned the reward {got}: it must be {what}")


@contextmanager
def closing(who: str) -> Iterator[None]:
    """Turns errors of a user's close() into a warning: what was done before it must not be lost."""
    try:
        with blamed(f"{who}: its close()"):
            yield
    except UserError as error:
        warnings.warn(str(error), RuntimeWarning, stacklevel=3)


def _bounds(actions: Any, who: str) -> tuple[np.ndarray, np.ndarray]:
    """float64[A] low and high of an action space."""
    from gymnasium.spaces import Box

    what = f"makes an environment with actions {actions}"
    if not isinstance(actions, Box) or not np.issubdtype(actions.dtype, np.floating):
        raise _refused(who, what, "COVR's actor and its priors are continuous: give it a Box of floats")
    if len(actions.shape) != 1 or not actions.shape[0]:
        raise _refused(who, what, "give it a Box of shape [A]")
    if not actions.is_bounded():
        raise _refused(who, what, "[-1, 1] cannot be scaled to them: give its Box finite low and high")
    return actions.low.astype(np.float64), actions.high.astype(np.float64)


def _frame_shape(observations: Any) -> tuple[int, int, int] | None:
    """[H, W, 3] of an observation space of frames; None of any other."""
    if getattr(observations, "dtype", None) == np.uint8 and _is_rgb(observations.shape):
        height, width, channels = observations.shape
        return height, width, channels
    return None


def _is_rgb(shape: tuple[int, ...] | None) -> bool:
    return shape is not None and len(shape) == 3 and shape[2] == 3


def _refused(who: str, what: str, remedy: str) -> UserError:
    return UserError(f"{who} {what}: {remedy}")


class OwnThread:
    """A thread of its own for a user's environments, because OpenGL contexts, among other things, belong to
    the thread that made them. Errors name the environment."""

    def __init__(self, name: str) -> None:
        self.name = f"environment {name}"
        self._thread = ThreadPoolExecutor(1, "covr-gymnasium")

    def __call__(self, work: Callable[[], T]) -> T:
        return self._thread.submit(work).result()

    def shutdown(self) -> None:
        self._thread.shutdown()


class GymnasiumSimulator:
    """Single environments with EnvPool's interface: the step after the end of an episode is the reset."""

    def __init__(self, make: Make, spaces: Spaces, config: "EnvConfig", seed: int) -> None:
        """Makes config.batch_size environments. Environment i gets seed + i in its first reset, and none
        later."""
        from gymnasium.wrappers import TimeLimit

        self._spaces, num_envs = spaces, config.batch_size
        self._seeds: list[int | None] = [seed + i for i in range(num_envs)]
        self._over = np.zeros(num_envs, bool)
        self._call = OwnThread(config.id)
        self._envs: list[gymnasium.Env[Any, Any]] = []

        def build() -> None:
            who = f"{self._call.name}: make()"
            for _ in range(num_envs):
                env = made(make, 1, who)
                if any(env.unwrapped is other.unwrapped for other in self._envs):
                    raise _refused(
                        who, "makes the same environment twice", "it must make a new one each time"
                    )
                self._envs.append(TimeLimit(env, config.max_episode_steps))

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
        with blamed(f"{self._call.name}: its render()"):
            return self._call(
                lambda: np.stack([np.asarray(self._envs[i].render()) for i in env_ids.tolist()])
            )

    def close(self) -> None:
        """Closes the environments. One that cannot be closed is a warning."""
        self._call(self._close_all)
        self._call.shutdown()

    def _close_all(self) -> None:
        for env in self._envs:
            with closing(self._call.name):
                env.close()

    def _begin(self, i: int) -> Any:
        with blamed(f"{self._call.name}: its reset()"):
            observation, _ = self._envs[i].reset(seed=self._seeds[i])
        self._seeds[i], self._over[i] = None, False
        return observation

    def _step(self, i: int, action: np.ndarray) -> tuple[Any, float, bool, bool]:
        if self._over[i]:
            return self._begin(i), 0.0, False, False
        env, spaces = self._envs[i], self._spaces
        # The scaled action may lie beyond a bound by a rounding error.
        bounded = action.clip(spaces.low, spaces.high).astype(env.action_space.dtype)
        with blamed(f"{self._call.name}: its step()"):
            observation, reward, terminated, truncated, _ = env.step(bounded)
            ended, cut = bool(terminated), bool(truncated)
        self._over[i] = ended or cut
        return observation, float(as_reward(reward, (), self._call.name)), ended, cut

    def _frames(self, observations: list[Any]) -> np.ndarray | None:
        if self._spaces.frame is None:
            return None
        frames = [np.asarray(each) for each in observations]
        for frame in frames:
            check_observation(frame, self._spaces.frame, self._call.name)
        return np.stack(frames)
