"""The agent's n_steps and gamma reach the buffer: agents train as they do with SB3's own buffers."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

pytest.importorskip("sb3_contrib")
from sb3_contrib import QRDQN, TQC, CrossQ
from stable_baselines3 import DDPG, DQN, SAC, TD3
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.env_util import make_vec_env

from covr_fast.integrations.sb3 import FastReplayBuffer

pytestmark = pytest.mark.filterwarnings("ignore:`n_steps=:UserWarning")  # SB3's: it does not know this buffer

DISCRETE = (DQN, QRDQN)
AGENTS = [SAC, TD3, DDPG, TQC, CrossQ, *DISCRETE]


def make(agent, **options):
    env = make_vec_env("CartPole-v1" if agent in DISCRETE else "Pendulum-v1", n_envs=2, seed=0)
    small = {"buffer_size": 200, "learning_starts": 20, "batch_size": 8, "policy_kwargs": {"net_arch": [8]}}
    return agent("MlpPolicy", env, seed=0, **small, **options)


def assert_same_weights(ours, theirs):
    for name, value in theirs.policy.state_dict().items():
        torch.testing.assert_close(ours.policy.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize(
    "given",
    [
        {"n_steps": 3},
        {"replay_buffer_kwargs": {"n_steps": 3}},
        {"n_steps": 3, "replay_buffer_kwargs": {"n_steps": 3, "gamma": 0.5}},
    ],
    ids=["agent", "buffer", "both"],
)
def test_agents_train_as_with_sb3s_own_buffer(agent, given):
    theirs = make(agent, n_steps=3, gamma=0.5).learn(60)
    ours = make(agent, gamma=0.5, replay_buffer_class=FastReplayBuffer, **given).learn(60)
    assert type(theirs.replay_buffer) is NStepReplayBuffer
    assert (ours.replay_buffer.n_steps, ours.replay_buffer.gamma) == (3, 0.5)
    assert_same_weights(ours, theirs)


def test_agents_of_one_step_train_as_with_sb3s_own_buffer():
    theirs = make(SAC, gamma=0.5).learn(60)
    ours = make(SAC, gamma=0.5, replay_buffer_class=FastReplayBuffer).learn(60)
    assert (ours.replay_buffer.n_steps, ours.replay_buffer.gamma) == (1, 0.5)
    assert ours.replay_buffer.sample(3).discounts is None
    assert_same_weights(ours, theirs)


def test_the_buffers_gamma_and_an_agent_by_default():
    """Samples of several steps carry their discounts, and SB3 trains with those."""
    options = {"n_steps": 3, "gamma": 0.5}
    theirs = make(SAC, replay_buffer_class=NStepReplayBuffer, replay_buffer_kwargs=options).learn(60)
    ours = make(SAC, replay_buffer_class=FastReplayBuffer, replay_buffer_kwargs=options).learn(60)
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize(
    "given, to_agent, message",
    [
        ({"n_steps": 3}, {"n_steps": 2}, r"replay_buffer_kwargs has n_steps=3, SAC has n_steps=2"),
        ({"gamma": 0.9}, {"gamma": 0.5}, r"has gamma=0\.9, SAC has gamma=0\.5: give it to SAC alone"),
        ({"n_steps": 3, "gamma": 0.9}, {"gamma": 0.5}, r"has gamma=0\.9, SAC has gamma=0\.5"),
        ({"gamma": 0.9}, {}, r"replay_buffer_kwargs has gamma=0\.9, SAC has gamma=0\.99"),
        ({"n_steps": 1}, {"n_steps": 3}, r"replay_buffer_kwargs has n_steps=1, SAC has n_steps=3"),
    ],
)
def test_a_contradiction_is_an_error(given, to_agent, message):
    with pytest.raises(ValueError, match=message):
        make(SAC, replay_buffer_class=FastReplayBuffer, replay_buffer_kwargs=given, **to_agent)


def test_subclasses_of_buffer_and_agent():
    class Buffer(FastReplayBuffer):
        def __init__(this, *args, **kwargs):
            super().__init__(*args, **kwargs)

    class Agent(SAC):
        def _setup_model(self):
            super()._setup_model()

    buffer = make(Agent, n_steps=3, gamma=0.5, replay_buffer_class=Buffer).replay_buffer
    assert (buffer.n_steps, buffer.gamma) == (3, 0.5)


def test_loaded_agents(tmp_path):
    model = make(SAC, n_steps=3, gamma=0.5, replay_buffer_class=FastReplayBuffer)
    model.learn(30)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    again = SAC.load(tmp_path / "model", env=model.get_env())
    assert (again.replay_buffer.n_steps, again.replay_buffer.gamma) == (3, 0.5)
    again.load_replay_buffer(tmp_path / "buffer")
    assert (again.replay_buffer.n_steps, again.replay_buffer.gamma) == (3, 0.5)
    again.learn(10, reset_num_timesteps=False)


def alone(**options):
    return FastReplayBuffer(10, spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (1,)), "cpu", 1, **options)


def test_without_an_agent():
    assert (alone().n_steps, alone().gamma) == (1, 0.99)
    buffer = alone(n_steps=np.int64(3), gamma=np.float32(0.5))
    assert (buffer.n_steps, buffer.gamma) == (3, 0.5)

    class Agent(SAC):
        def another_buffer(self):
            return alone(gamma=0.25)

    assert make(Agent, gamma=0.5).another_buffer().gamma == 0.25


@pytest.mark.parametrize("options", [{"n_steps": 0}, {"n_steps": 2.5}, {"gamma": 1.5}, {"gamma": -0.1}])
def test_values_out_of_range(options):
    with pytest.raises(ValueError, match=rf"{next(iter(options))} is .*must"):
        alone(**options)
