"""SAC on CarRacing pixels with Stable-Baselines3, each frame stored once.

pip install covr-fast[sb3] gymnasium[box2d]
"""

import sys

from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack

from covr_fast.integrations.sb3 import FastReplayBuffer

env = VecFrameStack(make_vec_env("CarRacing-v3", n_envs=2), 3)
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
model = SAC(
    "CnnPolicy", env, replay_buffer_class=FastReplayBuffer, buffer_size=50_000, learning_starts=100, verbose=1
)
model.learn(steps)
print(model.replay_buffer.buffer)
