"""Small agents and batches, eager, captured and compiled, and how they are compared."""

from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import numpy as np
import torch
from fake_graphs import FakeGraphs
from simulators import SIZE

from covr_fast import ReplayBuffer
from covr_fast.agents import SAC, AgentConfig, Kind, agent_config, make_agent
from covr_fast.agents.captured import CapturedUpdate

SHAPE = (3, SIZE, SIZE)
KINDS = get_args(Kind)
SMALL = AgentConfig(channels=(8, 8), strides=(2, 2), latent=16, hidden=32, graph=False)


def make_batch(seed=0, n=6, device="cpu", **changes):
    g = torch.Generator().manual_seed(seed)
    batch = {
        "obs": torch.rand(n, *SHAPE, generator=g).contiguous(memory_format=torch.channels_last),
        "next_obs": torch.rand(n, *SHAPE, generator=g).contiguous(memory_format=torch.channels_last),
        "action": torch.rand(n, 2, generator=g) * 2 - 1,
        "reward": torch.randn(n, generator=g),
        "discount": torch.full((n,), 0.9),
        "weight": torch.rand(n, generator=g),
    }
    extras = {"prior": torch.rand(n, 2, generator=g) * 2 - 1, "prior_mask": torch.ones(n)}
    moved = {name: value.to(device) for name, value in (batch | changes).items()}
    return SimpleNamespace(**moved, extras={name: value.to(device) for name, value in extras.items()})


def eager_agent(seed=0):
    return SAC(SHAPE, (2,), SMALL, seed=seed)


def small_agent(kind, seed=0, **changes):
    strides = (2, 2) if kind == "fast" else (2, 1)
    sizes = {"channels": (8, 8), "strides": strides, "latent": 16, "hidden": 32, "graph": False}
    return make_agent(SHAPE, (2,), replace(agent_config(kind), **(sizes | changes)), seed=seed)


def batch_of(kind, seed=0):
    """A batch in the form that the kind takes."""
    batch = make_batch(seed)
    if agent_config(kind).batch_form.dtype == torch.uint8:
        batch.obs, batch.next_obs = ((x * 255).to(torch.uint8) for x in (batch.obs, batch.next_obs))
    return batch


def captured_agent(seed=0):
    agent = eager_agent(seed)
    agent._captured = CapturedUpdate(agent._update, FakeGraphs())
    return agent


def asked(agent):
    return agent._captured._graphs.events


def assert_same(a, b):
    for name, module in a.modules().items():
        for one, other in zip(module.parameters(), b.modules()[name].parameters(), strict=True):
            assert torch.equal(one, other), name
    for name, tensor in a._tensors().items():
        assert torch.equal(tensor, b._tensors()[name]), name


def prioritized_buffer():
    return small_buffer("prioritized")


def small_buffer(sampler, device="cpu"):
    buffer = ReplayBuffer(
        64, num_envs=2, obs_shape=SHAPE, action_shape=(2,), sampler=sampler, seed=0, device=device,
        extras={"prior": (2,), "prior_mask": ()},
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for _ in range(32):
        obs, after = rng.integers(0, 256, (2, 2, *SHAPE), dtype=np.uint8)
        action = rng.uniform(-1, 1, (2, 2)).astype(np.float32)
        ended = np.ones(2, bool)
        reward = rng.normal(size=2).astype(np.float32)
        buffer.add(obs, action, reward, after, ended, ~ended, prior=action, prior_mask=np.ones(2))
    return buffer


def assert_steady(agent):
    """On a GPU, updates neither synchronise nor allocate once both values of `guide` have come."""
    batches = [make_batch(seed, device="cuda") for seed in range(4)]
    for step in range(16):
        agent.update(batches[step % 4], guide=step >= 8)
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(100):
            agent.update(batches[step % 4], guide=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() == allocated
