"""TorchRL's collector and priorities with covr_fast's replay buffer, on Pendulum's vectors.

pip install covr-fast[torchrl] gymnasium
"""

import sys

from torchrl.collectors import Collector
from torchrl.envs import GymEnv, StepCounter, TransformedEnv

from covr_fast.integrations.torchrl import FastReplayBuffer

env = TransformedEnv(GymEnv("Pendulum-v1"), StepCounter(max_steps=50))
frames = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
buffer = FastReplayBuffer(50_000, obs_keys=("observation",), sampler="prioritized", batch_size=256)
for data in Collector(env, None, frames_per_batch=200, total_frames=frames):
    buffer.extend(data)
    batch = buffer.sample()
    batch["td_error"] = batch["next", "reward"].abs()  # where a loss module would write its own
    buffer.update_tensordict_priority(batch)
print(batch)
print(buffer.buffer)
