"""An environment of your own, trained with COVR: the agent and nano, the small VLM, teach each other.

pip install covr-fast[train]

    python examples/own_task.py [steps] [run folder]
    covr-fast train custom --env.entry-point examples.own_task:Reach --out runs/reach  # the same from outside
"""

import sys

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from covr_fast import GymEnv, TrainConfig, Trainer

SIZE, LONGEST = 48, 20


class Reach(gymnasium.Env):
    """A small square, moved by actions in [-1, 1], shall reach a large one."""

    action_space = Box(-1, 1, (2,), np.float32)
    observation_space = Box(0, 255, (SIZE, SIZE, 3), np.uint8)
    metadata = {  # noqa: RUF012
        "prompt": "You control the small square. Move it onto the large one. "
        "Number 1 moves it: -1 to the left, 1 to the right. Number 2 moves it: -1 down, 1 up.",
        "action_names": ["left/right", "down/up"],
    }

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


def main(steps: int, out: str) -> None:
    config = TrainConfig.preset("custom")  # with nano
    config.env = GymEnv(make=Reach, num_envs=8, batch_size=4, height=SIZE, width=SIZE, grayscale=True)
    config.steps, config.covr.cold_start = steps, 1  # the VLM guides after its first round
    returns = Trainer(config, out).run()["evaluations"]
    random, trained = returns["random"]["mean"], returns["actor"]["mean"]
    print(f"mean return of 10 episodes: {random:.2f} with random actions, {trained:.2f} by the trained actor")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3000, sys.argv[2] if len(sys.argv) > 2 else "runs/reach")
