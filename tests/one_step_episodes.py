"""A replay buffer with random frames and room for priors. Every decision is an episode: no stack goes on."""

import numpy as np
import torch

from covr_fast import ReplayBuffer

ENVS, SHAPE = 4, (3, 56, 56)


def make_buffer(capacity: int = 64, **options) -> ReplayBuffer:
    extras = {"prior": (2,), "prior_mask": (), "prior_version": ((), torch.int64)}
    shapes = {"obs_shape": SHAPE, "action_shape": (2,)}
    return ReplayBuffer(capacity, num_envs=ENVS, seed=0, extras=extras, **shapes, **options)


def add_step(buffer: ReplayBuffer, rng: np.random.Generator) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Adds one decision per environment, without a prior. Returns ids, obs and next_obs."""
    obs, after = rng.integers(0, 256, (2, ENVS, *SHAPE), dtype=np.uint8)
    ended, zeros = np.ones(ENVS, bool), np.zeros((ENVS, 2), np.float32)
    unlabelled = {"prior": zeros, "prior_mask": zeros[:, 0], "prior_version": np.full(ENVS, -1)}
    return buffer.add(obs, zeros, zeros[:, 0], after, ended, ~ended, **unlabelled), obs, after
