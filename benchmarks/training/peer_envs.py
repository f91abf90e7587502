"""The peers' environments: CarRacing of gymnasium, the racetrack of highway-env, Cartpole of dm_control.

Frames, stacks, action repeat and time limit are those of covr_fast's settings.
"""

import os
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from covr_fast.env_config import EnvConfig

Maker = Callable[[], gym.Env[Any, Any]]
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


class Pixels(gym.Wrapper[np.ndarray, np.ndarray, Any, Any]):
    """Stacked grey frames uint8[C, H, W], and actions in [-1, 1] that are repeated."""

    def __init__(
        self,
        env: gym.Env[Any, Any],
        config: EnvConfig,
        action_dim: int,
        to_sim: Callable[[np.ndarray], np.ndarray],
        to_frame: Callable[[Any], np.ndarray],
    ):
        """`to_frame`: observation of `env` -> its frame, uint8[H0, W0, 3] or [H0, W0]. It is called once for
        all repeats of an action."""
        super().__init__(env)
        assert config.grayscale
        self.observation_space = gym.spaces.Box(0, 255, config.obs_shape, np.uint8)
        self.action_space = gym.spaces.Box(-1, 1, (action_dim,), np.float32)
        self._config, self._to_sim, self._to_frame = config, to_sim, to_frame
        self._stack = np.zeros(config.obs_shape, np.uint8)

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        obs, info = self.env.reset(**options)
        self._stack[:] = self._small(self._to_frame(obs))
        return self._stack.copy(), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        action, total = self._to_sim(action), 0.0
        for _ in range(self._config.action_repeat):
            obs, reward, terminated, truncated, _ = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        self._stack[:-1] = self._stack[1:]
        self._stack[-1] = self._small(self._to_frame(obs))
        return self._stack.copy(), total, terminated, truncated, {}

    def _small(self, frame: np.ndarray) -> np.ndarray:
        """uint8[H, W]"""
        size = (self._config.height, self._config.width)
        if frame.shape[:2] != size:
            channels_first = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None]
            resized = torch.nn.functional.interpolate(
                channels_first, size=size, mode="bilinear", antialias=True
            )
            frame = resized[0].permute(1, 2, 0).numpy()
        return frame if frame.ndim == 2 else (frame @ _LUMA).round().astype(np.uint8)


class DMControl(gym.Env[Any, np.ndarray]):
    """A task of dm_control. Frames are rendered on request."""

    def __init__(self, domain: str, task: str):
        os.environ.setdefault("MUJOCO_GL", "egl")
        from dm_control import suite

        self._env = suite.load(domain, task, task_kwargs={"random": 0})
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, ())
        self.action_space = gym.spaces.Box(-1, 1, self._env.action_spec().shape, np.float32)

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        self._env.reset()
        return None, {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        time_step = self._env.step(action)
        ended = time_step.last()
        terminated = ended and time_step.discount == 0
        return None, time_step.reward, terminated, ended and not terminated, {}

    def frame(self, height: int, width: int) -> np.ndarray:
        """Camera 0, uint8[H, W, 3]."""
        image: np.ndarray = self._env.physics.render(height, width, camera_id=0)
        return image


def car_racing(config: EnvConfig) -> gym.Env[Any, Any]:
    def to_sim(action: np.ndarray) -> np.ndarray:
        return np.array([action[0], max(action[1], 0), max(-action[1], 0)], np.float32)

    env = gym.make("CarRacing-v3", max_episode_steps=config.max_episode_steps, disable_env_checker=True)
    return Pixels(env, config, 2, to_sim, lambda obs: obs[:84])  # without the instruments


def racetrack(config: EnvConfig) -> gym.Env[Any, Any]:
    """The picture shows as many metres as that of EnvPool: 112 pixels of 5.5 a metre."""
    import highway_env

    gym.register_envs(highway_env)
    grey = {
        "type": "GrayscaleObservation", "observation_shape": (config.width, config.height), "stack_size": 1,
        "weights": _LUMA.tolist(), "scaling": config.width * 5.5 / 112,
    }  # fmt: skip
    env = gym.make(
        "racetrack-v0",
        config={"observation": grey, "offscreen_rendering": True},
        max_episode_steps=config.max_episode_steps,
        disable_env_checker=True,
    )
    return Pixels(env, config, 1, lambda action: action, lambda obs: obs[-1].T)


def cartpole(config: EnvConfig) -> gym.Env[Any, Any]:
    env = DMControl("cartpole", "swingup")
    return Pixels(env, config, 1, lambda action: action, lambda _: env.frame(config.height, config.width))


MAKERS = {"carracing": car_racing, "racetrack": racetrack, "cartpole": cartpole}
SOURCES = {"carracing": "gymnasium", "racetrack": "highway-env", "cartpole": "dm_control"}
"""The package that each comes from."""
