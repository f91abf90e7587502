"""Gymnasium environments whose frames spell out what they show, and the transitions that they must give."""

from dataclasses import dataclass

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

SIZE = 8
FRAMES = Box(0, 255, (SIZE, SIZE, 3), np.uint8)
NUMBERS = Box(0, 255, (3,), np.float32)
ACTIONS = Box(np.float32(-2), np.float32(2), (1,))


def length_of(env: int, episode: int) -> int:
    return 1 + (3 * env + 5 * episode) % 7


def terminates(env: int, episode: int) -> bool:
    return (env + episode) % 2 == 0


def reward_of(env: int, episode: int, step: int, action: float) -> float:
    return env + episode / 8 + step / 64 + action


class Counting(gymnasium.Env):
    """A frame's three channels are its environment (the seed of its first reset), episode and step."""

    action_space = ACTIONS

    def __init__(self, rendered: bool = False) -> None:
        self.render_mode = "rgb_array" if rendered else None
        self.observation_space = NUMBERS if rendered else FRAMES
        self.env, self.episode, self.over = -1, -1, True

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.env, self.episode = seed, -1
        self.episode, self.count, self.over = self.episode + 1, 0, False
        return self.observation(), {}

    def step(self, action):
        assert not self.over, "a step after the end"
        self.count += 1
        self.over = self.count == length_of(self.env, self.episode)
        ends = terminates(self.env, self.episode)
        reward = reward_of(self.env, self.episode, self.count, float(action[0]))
        return self.observation(), reward, self.over and ends, self.over and not ends, {"count": self.count}

    def render(self):
        frame = np.zeros(FRAMES.shape, np.uint8)
        frame[:] = self.env % 256, self.episode % 256, self.count
        return frame

    def observation(self):
        return np.zeros(3, np.float32) if self.render_mode else self.render()


class ThirdParty(VectorEnv):
    """As other libraries have them: nothing but what gymnasium's VectorEnv asks for, and arrays that are used
    again. The step after the end of an episode is the reset."""

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.single_action_space, self.single_observation_space = ACTIONS, FRAMES
        self.envs = [Counting() for _ in range(num_envs)]
        self.frames = np.zeros((num_envs, *FRAMES.shape), np.uint8)

    def reset(self, *, seed=None, options=None):
        assert not options
        for i, env in enumerate(self.envs):
            self.frames[i], _ = env.reset(seed=None if seed is None else seed + i)
        return self.frames, {}

    def step(self, actions):
        rows = []
        for i, env in enumerate(self.envs):
            if env.over:
                self.frames[i], _ = env.reset()
                rows.append((0.0, False, False))
            else:
                self.frames[i], *row, _ = env.step(actions[i])
                rows.append(row)
        return self.frames, *map(np.array, zip(*rows, strict=True)), {}


def vectors(mode: str, *, rendered: bool = False, parallel: bool = False, **options):
    """A `make` for gymnasium's own vector environments in an autoreset mode."""
    kind = AsyncVectorEnv if parallel else SyncVectorEnv

    def make(num_envs: int) -> VectorEnv:
        one = [lambda: Counting(rendered)] * num_envs
        return kind(one, autoreset_mode=mode, **options)

    return make


@dataclass(frozen=True)
class Transition:
    """Labels (environment, episode, step) of stacked frames, oldest first, and what happened between them."""

    obs: tuple[tuple[int, int, int], ...]
    action: float
    reward: float
    next_obs: tuple[tuple[int, int, int], ...]
    terminated: bool
    truncated: bool


def act(env: int, episode: int, step: int) -> float:
    """The action in [-1, 1] for a newest frame."""
    return ((7 * env + 3 * episode + step) % 9 - 4) / 4


def expected(env: int, count: int, *, stack: int, repeat: int, longest: int) -> list[Transition]:
    """The first `count` transitions of an environment."""
    found: list[Transition] = []
    episode = 0
    while len(found) < count:
        length = min(length_of(env, episode), longest)
        terminal = terminates(env, episode) and length_of(env, episode) <= longest
        shown = [(env, episode, 0)] * stack
        step = 0
        while step < length:
            action, reward, before = act(env, episode, step), np.float32(0), tuple(shown[-stack:])
            for _ in range(min(repeat, length - step)):
                step += 1
                reward += np.float32(reward_of(env, episode, step, 2 * action))
            shown.append((env, episode, step))
            ends = step == length
            after = tuple(shown[-stack:])
            found.append(
                Transition(before, action, float(reward), after, ends and terminal, ends and not terminal)
            )
        episode += 1
    return found[:count]
