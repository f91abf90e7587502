"""Environments that give pictures, rollouts of them into several replay buffers at once, and comparisons."""

import copy

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecTransposeImage

from covr_fast.integrations.sb3 import FastReplayBuffer

ARRAYS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


class Pixels(gym.Env):
    """Random pictures, in episodes that terminate or are truncated."""

    def __init__(self, shape=(16, 20, 3), discrete=False, length=9, key=None):
        box = spaces.Box(0, 255, shape, np.uint8)
        self.key = key
        self.observation_space = spaces.Dict({key: box, "pose": spaces.Box(-1, 1, (2,))}) if key else box
        self.action_space = spaces.Discrete(3) if discrete else spaces.Box(-1, 1, (2,))
        self.length = length

    def _obs(self):
        box = self.observation_space[self.key] if self.key else self.observation_space
        picture = self.np_random.integers(0, 256, box.shape, dtype=np.uint8)
        pose = self.np_random.standard_normal(2).astype(np.float32)
        return {self.key: picture, "pose": pose} if self.key else picture

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, self.length + 1))
        return self._obs(), {}

    def step(self, action):
        self.left -= 1
        terminated = self.left == 0 and bool(self.np_random.integers(2))
        return self._obs(), float(self.np_random.random()), terminated, self.left == 0 and not terminated, {}


def vec_env(n_envs=2, stack=None, transpose=True, **options):
    env = DummyVecEnv([lambda: Pixels(**options) for _ in range(n_envs)])
    env.seed(0)
    if stack:
        env = VecFrameStack(env, stack)
    return VecTransposeImage(env) if transpose else env


def rollout(env, buffers, steps):
    """As SB3's off-policy agents store their transitions."""
    obs = env.reset()
    for _ in range(steps):
        action = np.stack([env.action_space.sample() for _ in range(env.num_envs)])
        new_obs, reward, done, infos = env.step(action)
        next_obs = copy.deepcopy(new_obs)
        for i in np.flatnonzero(done):
            final = infos[i]["terminal_observation"]
            if isinstance(final, dict):
                for key, value in final.items():
                    next_obs[key][i] = value
            else:
                next_obs[i] = final
        for buffer in buffers:
            buffer.add(obs, next_obs, action, reward, done, infos)
        obs = new_obs


def assert_same(a, b):
    for name, x, y in zip(a._fields, a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def drawn(buffer, size=64, env=None, seed=3):
    np.random.seed(seed)  # noqa: NPY002
    return buffer.sample(size, env)


def assert_same_arrays(theirs, ours, names=ARRAYS):
    for name in names:
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)


def pair(env, size, sb3=SB3ReplayBuffer, **options):
    """SB3's own buffer and ours for the same spaces."""
    return pair_of(size, env.observation_space, env.action_space, env.num_envs, sb3, **options)


def pair_of(size, obs_space, action_space, n_envs=1, sb3=SB3ReplayBuffer, **options):
    args = size, obs_space, action_space, "cpu", n_envs
    return sb3(*args, **options), FastReplayBuffer(*args, **options)
