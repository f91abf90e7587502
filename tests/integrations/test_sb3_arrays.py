"""SB3's arrays of a buffer: what is written to them reaches what is sampled, or is refused."""

import copy
import operator
import pickle
import re

import numpy as np
import pytest
from gymnasium import spaces

pytest.importorskip("stable_baselines3")
from sb3_pixels import assert_same, assert_same_arrays, drawn, pair, rollout, vec_env
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer

from covr_fast.buffer import ReplayBuffer
from covr_fast.buffer.output import BatchWriter
from covr_fast.integrations.sb3 import FastReplayBuffer

NAMES = ("rewards", "actions", "dones", "timeouts")


def filled(steps=33, size=40, length=9, **options):
    env = vec_env(2, 3, length=length)
    buffers = pair(env, size, **options)
    rollout(env, buffers, steps)
    return buffers


def same_samples(theirs, ours):
    for seed in range(3):
        assert_same(*(drawn(buffer, 200, seed=seed) for buffer in (theirs, ours)))


def whole(buffer, name):
    getattr(buffer, name)[:] = 1


def element(buffer, name):
    getattr(buffer, name)[3, 1] = 0
    getattr(buffer, name)[5] = 1


def mask(buffer, name):
    array = getattr(buffer, name)
    array[array > 0.5] = 0


def in_place(buffer, name):
    """As `buffer.rewards *= 0.1`."""
    if name in ("rewards", "actions"):
        setattr(buffer, name, operator.imul(getattr(buffer, name), 0.1))
        setattr(buffer, name, operator.iadd(getattr(buffer, name), 2))
    else:
        setattr(buffer, name, operator.imul(getattr(buffer, name), 0))


def in_place_of_a_name(buffer, name):
    array = getattr(buffer, name)
    array *= 0


def out_argument(buffer, name):
    array = getattr(buffer, name)
    np.clip(array, 0, 0.5 if name in ("rewards", "actions") else 1, out=array)
    np.negative(array, out=array, where=array < 0)


def replaced(buffer, name):
    values = np.arange(getattr(buffer, name).size, dtype=np.float32).reshape(getattr(buffer, name).shape)
    setattr(buffer, name, values if name in ("rewards", "actions") else (values % 3 == 0).astype(np.float32))


WRITES = [whole, element, mask, in_place, in_place_of_a_name, out_argument, replaced]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_sampled(name, write):
    buffers = filled()
    for buffer in buffers:
        write(buffer, name)
    same_samples(*buffers)
    np.testing.assert_allclose(getattr(buffers[1], name)[:16], getattr(buffers[0], name)[:16])


@pytest.mark.parametrize("write", WRITES)
def test_written_rewards_enter_n_step_returns(write):
    buffers = filled(sb3=NStepReplayBuffer, n_steps=3, gamma=0.9)
    for buffer in buffers:
        write(buffer, "rewards")
    same_samples(*buffers)


def test_slices_of_rewards_and_actions_are_the_buffers():
    theirs, ours = filled()
    for buffer in (theirs, ours):
        buffer.rewards[4][1] = 9
        buffer.actions[:, 0][2][:] = 5
    same_samples(theirs, ours)


@pytest.mark.parametrize("name", NAMES)
def test_another_arrangement_is_the_buffers_or_cannot_be_written(name):
    ours = filled()[1]
    for arrange in (np.ravel, lambda array: array.reshape(-1, 1), lambda array: array.reshape(-1)):
        before = np.array(getattr(ours, name))
        array = arrange(getattr(ours, name))
        try:
            array[:1] = 1 - array[:1]
        except ValueError:
            assert np.array_equal(getattr(ours, name), before)
        else:
            assert not np.array_equal(getattr(ours, name), before)


def test_ends_that_were_written_end_n_step_returns():
    buffers = filled(20, length=30, sb3=NStepReplayBuffer, n_steps=3, gamma=0.9)
    for buffer in buffers:
        buffer.dones[3:18:4] = 1
        buffer.timeouts[7:18:8] = 1
    same_samples(*buffers)


def test_a_part_of_the_ends_says_what_to_assign_to():
    _, ours = filled()
    for name in ("dones", "timeouts"):
        before = np.array(getattr(ours, name))
        with pytest.raises(ValueError, match=rf"assign to buffer\.{name}\[position, environment\]"):
            getattr(ours, name)[3][1] = 1
        with pytest.raises(ValueError, match=r"0 or 1, got 0\.5"):
            getattr(ours, name)[:] = 0.5
        with pytest.raises(ValueError, match="read-only"):
            getattr(ours, name).fill(1)
        np.testing.assert_array_equal(getattr(ours, name), before)


@pytest.mark.parametrize("name", ["observations", "next_observations"])
def test_observations_say_that_they_stay(name):
    _, ours = filled()
    before = np.array(getattr(ours, name))
    for write in (whole, element, in_place_of_a_name):
        with pytest.raises(ValueError, match=rf"buffer\.{name} cannot be changed.*add\(\).*own ReplayBuffer"):
            write(ours, name)
    with pytest.raises(ValueError, match="cannot be changed"):
        getattr(ours, name)[3][0] = 1
    with pytest.raises(ValueError, match="cannot be changed"):
        setattr(ours, name, before)
    np.testing.assert_array_equal(getattr(ours, name), before)


def test_dict_observations_say_that_they_stay():
    env = vec_env(2, 3, shape=(16, 20, 3), key="camera")
    _, ours = pair(env, 40, DictReplayBuffer)
    rollout(env, [ours], 12)
    images = ours.observations
    with pytest.raises(ValueError, match="cannot be changed"):
        images["pose"][:] = 0
    with pytest.raises(ValueError, match="cannot be changed"):
        images["pose"] = np.zeros(3)
    with pytest.raises(ValueError, match="cannot be changed"):
        images |= {"pose": 0}
    assert type(copy.deepcopy(images)) is dict


def test_what_is_taken_from_an_array_is_the_callers_own():
    _, ours = filled()
    for name in ("dones", "timeouts", "observations"):
        array = getattr(ours, name)
        for taken in (array.copy(), array + 1, copy.deepcopy(array), pickle.loads(pickle.dumps(array))):
            taken[0] = 7
            taken *= 2
            assert (taken[0] == 14).all()
        np.testing.assert_array_equal(getattr(ours, name), array)


def test_nothing_can_be_written_into_an_empty_buffer():
    buffer = FastReplayBuffer(10, spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (1,)), "cpu", 1)
    for name in NAMES:
        with pytest.raises(ValueError, match=r"the buffer is empty.*add\(\) transitions first"):
            getattr(buffer, name)[:] = 1


def test_a_replacement_of_another_shape_is_refused():
    _, ours = filled()
    for name in NAMES:
        message = f"{name} has shape (33,): it must be {getattr(ours, name).shape}"
        with pytest.raises(ValueError, match=re.escape(message)):
            setattr(ours, name, np.zeros(33))


def test_columns_are_read_without_observations(monkeypatch):
    theirs, ours = filled()
    monkeypatch.setattr(BatchWriter, "batch", None)
    assert_same_arrays(theirs, ours, NAMES)
    ours.dones[ours.pos - 1] = True


def test_a_second_learn_looks_at_no_observation(monkeypatch):
    """With optimize_memory_usage, SB3 sets an end in `dones` then."""
    env = vec_env(1, 2, shape=(16, 16, 1))
    options = {"buffer_size": 60, "learning_starts": 100, "policy_kwargs": {"net_arch": [8]}}
    agent = SAC(
        "MlpPolicy", env, replay_buffer_class=FastReplayBuffer, optimize_memory_usage=True, seed=0, **options
    )
    agent.learn(10)
    gathers = []
    monkeypatch.setattr(BatchWriter, "batch", lambda *args: gathers.append(args))
    with pytest.warns(UserWarning, match="last trajectory in the replay buffer will be truncated"):
        agent.learn(5)
    assert not gathers
    assert agent.replay_buffer.dones[9] == 1


def test_observations_are_rebuilt_in_parts(monkeypatch):
    """Beside the array itself there are only those of a few transitions."""
    theirs, ours = filled(300, 1200)
    largest = []
    get = ReplayBuffer.get
    monkeypatch.setattr(
        ReplayBuffer, "get", lambda self, ids, **o: (largest.append(len(ids)), get(self, ids, **o))[1]
    )
    np.testing.assert_array_equal(ours.observations, theirs.observations)
    np.testing.assert_array_equal(ours.next_observations, theirs.next_observations)
    assert max(largest) <= 256


def test_positions_cannot_be_moved():
    _, ours = filled(10)
    ours.pos = 0
    row = np.zeros((2, 9, 16, 20), np.uint8)
    with pytest.raises(ValueError, match=r"pos was set to 0.*reset\(\)"):
        ours.add(row, row, np.zeros((2, 2)), np.zeros(2), np.zeros(2), [{}, {}])
    assert len(ours.buffer) == 20


@pytest.mark.parametrize("dtype", [np.int64, np.int8])
def test_integer_actions_can_be_written(dtype):
    space = spaces.Box(-1, 1, (3,)), spaces.MultiBinary(4) if dtype == np.int8 else spaces.Discrete(4)
    buffer = FastReplayBuffer(10, *space, "cpu", 1)
    obs = np.zeros((1, 3), np.float32)
    action = np.ones((1, 4) if dtype == np.int8 else (1,), dtype)
    buffer.add(obs, obs, action, np.zeros(1), np.zeros(1), [{}])
    assert buffer.actions.dtype == dtype
    buffer.actions[0] = 0
    assert (buffer.sample(2).actions == 0).all()
