"""The Stable-Baselines3 drop-in: the same rows as SB3's own buffers, and real agents."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

pytest.importorskip("stable_baselines3")
from sb3_pixels import ARRAYS, assert_same, assert_same_arrays, drawn, pair, pair_of, rollout, vec_env
from stable_baselines3 import DDPG, DQN, SAC, TD3
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from covr_fast.integrations.sb3 import FastReplayBuffer


@pytest.mark.parametrize("stack, transpose", [(None, True), (3, True), (4, False), (None, False)])
@pytest.mark.parametrize("timeouts", [True, False])
def test_rows_agree_with_sb3(stack, transpose, timeouts):
    env = vec_env(3, stack, transpose)
    ours_too = pair(env, 100, handle_timeout_termination=timeouts)
    for steps in (20, 50):
        rollout(env, ours_too, steps)  # each resets the environments in the midst of their episodes
        samples = [[drawn(buffer), buffer._get_samples(np.arange(20))] for buffer in ours_too]
        for theirs, ours in zip(*samples, strict=True):
            assert_same(theirs, ours)
    assert ours_too[1].size() == ours_too[0].size() == 33
    assert ours_too[1]._stored.stacks["obs"].frames == (stack or 1)


def test_stacks_take_the_memory_of_frames():
    env = vec_env(2, 4, shape=(84, 84, 3), length=60)
    buffer = FastReplayBuffer(
        400, env.observation_space, env.action_space, "cpu", 2, optimize_memory_usage=True
    )
    rollout(env, [buffer], 20)
    assert buffer.buffer.nbytes / 400 < 1.1 * 84 * 84 * 3
    assert len(buffer.buffer) == 40


def test_environments_that_do_not_keep_to_their_dtypes():
    theirs, ours = pair_of(20, spaces.Box(0, 255, (3, 8, 8), np.uint8), spaces.Discrete(4), 2)
    obs, next_obs = np.random.default_rng(0).integers(0, 256, (2, 2, 3, 8, 8))
    for buffer in (theirs, ours):
        buffer.add(obs, next_obs, np.array([1.0, 3.0]), np.zeros(2), np.zeros(2, bool), [{}, {}])
    assert_same_arrays(theirs, ours)


def test_observations_that_are_no_stack():
    theirs, ours = pair_of(20, spaces.Box(0, 255, (12, 8, 8), np.uint8), spaces.Discrete(4), 2)
    rng = np.random.default_rng(0)
    for i in range(40):
        obs, next_obs = rng.integers(0, 256, (2, 2, 12, 8, 8), dtype=np.uint8)
        for buffer in (theirs, ours):
            buffer.add(
                obs, next_obs, np.array([1, 2]), np.array([i, i]), np.array([False, i % 5 == 0]), [{}, {}]
            )
    assert_same(drawn(theirs), drawn(ours))


def test_dict_observations_agree():
    env = vec_env(2, 3, shape=(16, 20, 3), key="camera")
    theirs, ours = pair(env, 60, DictReplayBuffer)
    rollout(env, (theirs, ours), 50)
    assert ours._stored.stacks["camera"].frames == 3
    assert_same(drawn(theirs), drawn(ours))


@pytest.mark.parametrize("normalize", [False, True])
def test_n_steps_agree(normalize):
    env = vec_env(2, 3)
    theirs, ours = pair(env, 80, NStepReplayBuffer, n_steps=3, gamma=0.9)
    rollout(env, (theirs, ours), 70)
    normalizer = VecNormalize(env, norm_obs=False, gamma=0.9) if normalize else None
    assert_same(drawn(theirs, 200, normalizer), drawn(ours, 200, normalizer))


def test_vec_normalize_is_honoured():
    env = make_vec_env("Pendulum-v1", n_envs=2, seed=0)
    normalizer = VecNormalize(env)
    normalizer.reset()
    for _ in range(20):
        normalizer.step(np.zeros((2, 1), np.float32))
    theirs, ours = pair(env, 100)
    rollout(env, (theirs, ours), 60)
    assert_same(drawn(theirs, env=normalizer), drawn(ours, env=normalizer))


def test_gymnasium_infos():
    space, action = spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (1,))
    buffer = FastReplayBuffer(10, space, action, "cpu", 2)
    zero, no = np.zeros((2, 3), np.float32), np.zeros(2, bool)
    buffer.add(zero, zero, np.zeros((2, 1)), np.zeros(2), no, {})
    buffer.add(
        zero, zero, np.zeros((2, 1)), np.zeros(2), ~no, {"TimeLimit.truncated": np.array([True, False])}
    )
    assert buffer.dones[1].tolist() == [1, 1]
    assert buffer.timeouts[1].tolist() == [1, 0]


SMALL = {"buffer_size": 200, "learning_starts": 20, "batch_size": 8}


@pytest.mark.parametrize("agent", [SAC, TD3, DDPG, DQN])
@pytest.mark.parametrize("optimize", [False, True])
def test_agents_learn_save_and_go_on(agent, optimize, tmp_path):
    env = vec_env(1 if agent is DQN else 2, 2, shape=(16, 16, 1), discrete=agent is DQN)
    model = agent(
        "MlpPolicy",
        env,
        replay_buffer_class=FastReplayBuffer,
        replay_buffer_kwargs={"n_steps": 2},
        optimize_memory_usage=optimize,
        policy_kwargs={"net_arch": [8]},
        seed=0,
        **SMALL,
    )
    model.learn(40)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    again = agent.load(tmp_path / "model", env=env)
    again.load_replay_buffer(tmp_path / "buffer")
    np.testing.assert_array_equal(again.replay_buffer.observations, model.replay_buffer.observations)
    again.learn(20)
    again.learn(20, reset_num_timesteps=False)
    assert again.replay_buffer._stored.stacks["obs"].frames == 2


@pytest.mark.parametrize("key, policy", [("camera", "MultiInputPolicy"), (None, "CnnPolicy")])
def test_agents_learn_from_pixels(key, policy):
    kwargs = {"net_arch": [8]} | ({} if key else {"features_extractor_kwargs": {"features_dim": 8}})
    env = vec_env(1, 2, shape=(36, 36, 1), key=key)
    SAC(policy, env, replay_buffer_class=FastReplayBuffer, policy_kwargs=kwargs, **SMALL).learn(40)


def test_empty_and_reset():
    buffer = FastReplayBuffer(10, spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (1,)), "cpu", 1)
    with pytest.raises(IndexError, match="the buffer is empty"):
        buffer._get_samples(np.zeros(1, np.int64))
    buffer.add(np.zeros((1, 3)), np.ones((1, 3)), np.zeros((1, 1)), np.zeros(1), np.zeros(1), [{}])
    with pytest.raises(IndexError, match="hold no transition"):
        buffer._get_samples(np.array([0, 4]))
    buffer.reset()
    assert buffer.size() == 0


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64, np.float16, np.float64])
def test_arrays_before_anything_was_added(dtype):
    theirs, ours = pair_of(20, spaces.Box(0, 100, (3,), dtype=dtype), spaces.Discrete(4), 2)
    assert_same_arrays(theirs, ours)
    for name in ARRAYS:
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype, name
    ours.full = theirs.full = True
    a, b = ours.sample(7), theirs.sample(7)
    assert a.observations.dtype == b.observations.dtype
    assert torch.equal(a.observations, b.observations)
    assert torch.equal(a.actions, b.actions)


def test_ends_can_be_corrected():
    env = vec_env(length=30)
    buffer = FastReplayBuffer(10, env.observation_space, env.action_space, "cpu", 2, n_steps=3)
    rollout(env, [buffer], 5)
    dones = buffer.dones
    for end in (1, 0, 1):
        dones[1:3, 1] = end
        assert buffer.dones[1:3, 1].tolist() == [end, end]
        np.testing.assert_array_equal(buffer.dones, dones)
    rollout(env, [buffer], 2)
    now = np.array(buffer.dones)
    dones[0, 0] = now[0, 0] = 1 - now[0, 0]  # what was added since stays as it is
    np.testing.assert_array_equal(buffer.dones, now)
