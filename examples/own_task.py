"""An environment of your own, trained with COVR: the agent and nano, the small VLM, teach each other.

pip install covr-fast[train]

    python examples/own_task.py [steps] [run folder]
"""

import sys
from dataclasses import replace

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from covr_fast import TrainConfig, Trainer, load_policy, make_env, register_task

SIZE, LONGEST = 48, 20


class Reach(gymnasium.Env):
    """A small square, moved by actions in [-1, 1], shall reach a large one."""

    action_space = Box(-1, 1, (2,), np.float32)
    observation_space = Box(0, 255, (SIZE, SIZE, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.small, self.large = self.np_random.uniform(0.1, 0.9, (2, 2))
        self.steps = 0
        return self.picture(), {}

    def step(self, action):
        self.small = np.clip(self.small + 0.08 * action, 0, 1)
        self.steps += 1
        distance = float(np.linalg.norm(self.small - self.large))
        reached = distance < 0.08
        return self.picture(), 1.0 if reached else -distance, reached, self.steps == LONGEST, {}

    def picture(self):
        frame = np.full((SIZE, SIZE, 3), 40, np.uint8)
        for place, half, colour in ((self.large, 5, (200, 60, 60)), (self.small, 2, (250, 250, 250))):
            column, row = (place[0] * (SIZE - 1)).astype(int), ((1 - place[1]) * (SIZE - 1)).astype(int)
            frame[max(0, row - half) : row + half + 1, max(0, column - half) : column + half + 1] = colour
        return frame


register_task(
    "Reach",
    Reach,
    "You control the small square. Move it onto the large one. "
    "Number 1 moves it: -1 to the left, 1 to the right. Number 2 moves it: -1 down, 1 up.",
    ["left/right", "down/up"],
)


def main(steps: int, out: str) -> None:
    config = TrainConfig.preset("carracing")  # with nano
    config.env.id, config.env.height, config.env.width, config.env.action_repeat = "Reach", SIZE, SIZE, 1
    config.env.num_envs, config.env.batch_size = 8, 4
    config.steps, config.warmup, config.decisions_per_update = steps, steps // 4, 2
    config.vlm.every, config.log_every = 10, steps // 10
    config.replay.batch_size = 32
    config.covr.psi_0, config.covr.min_samples, config.covr.cold_start = steps // 3, 32, 1
    config.tuner = replace(config.tuner, max_steps=30)
    Trainer(config, out).run()

    policy = load_policy(out)  # another process would call register_task first
    with make_env(config.env) as envs:
        print("the trained actor's first actions:", *policy(envs.reset()))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 600, sys.argv[2] if len(sys.argv) > 2 else "runs/reach")
