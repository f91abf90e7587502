"""States of the drop-in: what continues as it was, and what is refused."""

import copy
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("torchrl")
from tensordict import TensorDict
from torch.utils._pytree import tree_map
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl_peer import assert_same, make, transitions

from covr_fast.integrations.torchrl import FastReplayBuffer

NESTED = {
    "obs_keys": (("agent", "state"),),
    "action_key": ("agent", "action"),
    "reward_key": ("agent", "reward"),
    "priority_key": ("agent", "error"),
}
KINDS = {
    "plain": {},
    "prioritized": {"sampler": "prioritized"},
    "recent, n-step": {"sampler": "recent", "n_step": 3, "gamma": np.float32(0.5)},
    "streams": {"num_envs": 2},
    "nested": {**NESTED, "sampler": "prioritized", "n_step": 2},
}


def content(**options) -> TensorDict:
    data = transitions(extra=torch.randn(24, 2).bfloat16())
    data["next", "reward"] = data["next", "reward"].double()
    data["collector", "traj_ids"] = data["next", "done"].cumsum(0)[:, 0] - data["next", "done"][:, 0].long()
    if options.get("obs_keys") != NESTED["obs_keys"]:
        return data
    agent = TensorDict({"state": data["observation"], "action": data["action"]}, [24])
    following = TensorDict({"state": data["next", "observation"], "reward": data["next", "reward"]}, [24])
    data = data.exclude("observation", "action", ("next", "observation"), ("next", "reward"))
    data["agent"], data["next", "agent"] = agent, following
    return data


def assert_continues(buffer: FastReplayBuffer, again: FastReplayBuffer, **options) -> None:
    """Both draw and store the same from now on."""
    for _ in range(2):
        one, other = buffer.sample(32), again.sample(32)
        assert_same(one, other)
        assert torch.equal(one["index"], other["index"])
        more = content(**options)
        assert torch.equal(buffer.extend(more), again.extend(more))
    assert len(buffer) == len(again)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["state_dict", "dumps", "pickle", "deepcopy"])
def test_a_copy_continues_as_the_buffer_would_have(kind, way, tmp_path):
    options = KINDS[kind]
    buffer, again = make(**options), make(**options)
    buffer.extend(content(**options)[:20])  # a trajectory is open
    buffer.sample(4)
    if way == "state_dict":
        torch.save(buffer.state_dict(), tmp_path / "state.pt")
        again.load_state_dict(torch.load(tmp_path / "state.pt"))
    elif way == "dumps":
        buffer.dumps(tmp_path / "new" / "folder")
        buffer.dumps(tmp_path / "new" / "folder")
        again.loads(tmp_path / "new" / "folder")
    else:
        again = copy.deepcopy(buffer) if way == "deepcopy" else pickle.loads(pickle.dumps(buffer))
    assert_continues(buffer, again, **options)
    size = len(buffer)
    again.extend(content(**options))
    assert len(buffer) == size


def test_a_state_does_not_change_with_the_buffer():
    buffer, again = make(capacity=30), make(capacity=30)
    data = content()
    index = buffer.extend(data)
    state = buffer.state_dict()
    buffer.extend(content())
    again.load_state_dict(state)
    assert torch.equal(again[index]["observation"], data["observation"])


def test_states_of_empty_buffers():
    buffer = make()
    empty = buffer.state_dict()
    buffer.extend(content())
    buffer.load_state_dict(empty)
    assert len(buffer) == 0
    buffer.extend(transitions())
    with pytest.raises(ValueError, match="capacity=1000, this one has 999"):
        make(capacity=999).load_state_dict(empty)


def fingerprint(buffer: FastReplayBuffer) -> str:
    numbers = tree_map(lambda v: v.tolist() if isinstance(v, torch.Tensor) else v, buffer.state_dict())
    return repr(numbers)


@pytest.mark.parametrize("filled", [True, False])
@pytest.mark.parametrize(
    ("options", "saved", "own"),
    [
        ({"capacity": 500}, "capacity=500", "1000"),
        ({"num_envs": 2}, "num_envs=2", "1"),
        ({"frame_stack": 3}, "frame_stack=3", "1"),
        ({"n_step": 3}, "n_step=3", "1"),
        ({"gamma": 0.9}, "gamma=0.9", "0.99"),
        ({"sampler": "recent"}, r"sampler='Recent\(.*\)'", r"'Uniform\(\)'"),
        ({"obs_keys": ("observation", "extra")}, "obs_keys=\"'observation', 'extra'\"", "\"'observation'\""),
        ({"action_key": "extra"}, "action_key=\"'extra'\"", "\"'action'\""),
        ({"reward_key": "gain"}, "reward_key=\"'gain'\"", "\"'reward'\""),
    ],
)
def test_states_of_other_settings_are_refused(options, saved, own, filled):
    data = content()
    data["next", "extra"], data["next", "gain"] = data["extra"], data["next", "reward"]
    other, buffer = make(**options), make()
    other.extend(data)
    if filled:
        buffer.extend(data)
    before = fingerprint(buffer)
    with pytest.raises(ValueError, match=rf"a buffer with {saved}, this one has {own}: build the buffer"):
        buffer.load_state_dict(other.state_dict())
    assert fingerprint(buffer) == before


def test_what_belongs_to_the_reader_stays_the_readers():
    buffer = make(batch_size=3, pixels_dtype=torch.float32, priority_key="error")
    other = make(batch_size=7)
    other.extend(content())
    buffer.load_state_dict(other.state_dict())
    assert (buffer.batch_size, buffer.pixels_dtype, buffer.priority_key) == (3, torch.float32, "error")


def test_states_of_other_entries_are_refused():
    buffer, other = make(), make()
    other.extend(content())
    buffer.extend(transitions(extra=torch.randn(24, 2)))
    before = fingerprint(buffer)
    match = r"'extra' is \(torch.bfloat16, \(2,\)\) there and \(torch.float32, \(2,\)\) here.*empty\(\)"
    with pytest.raises(ValueError, match=match):
        buffer.load_state_dict(other.state_dict())
    assert fingerprint(buffer) == before
    buffer.empty()
    buffer.load_state_dict(other.state_dict())
    assert_continues(other, buffer)


DAMAGES = {
    "no tensors": lambda state: state["buffer"].pop("tensors"),
    "no layout": lambda state: state.pop("layout"),
    "a tensor is missing": lambda state: state["buffer"]["tensors"].pop("column./extra"),
    "a tensor is short": lambda state: state["buffer"]["tensors"].update(reward=torch.zeros(7)),
    "a tensor that would spread": lambda state: state["buffer"]["tensors"].update(reward=torch.zeros(1)),
    "a tensor was cast": lambda state: state["buffer"]["tensors"].update(
        {"column./extra": state["buffer"]["tensors"]["column./extra"].double()}
    ),
    "no buffer": lambda state: state.update(buffer=None),
    "another layout": lambda state: state["layout"].update(others=[]),
    "an unknown dtype": lambda state: state["layout"]["action"].update(dtype="float31"),
    "streams": lambda state: state["streams"].update(last_used=torch.zeros(3)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_states_leave_the_buffer_as_it_was(damage):
    buffer = make()
    buffer.extend(content())
    state, before = buffer.state_dict(), fingerprint(buffer)
    DAMAGES[damage](state)
    with pytest.raises(ValueError, match="the state is damaged"):
        buffer.load_state_dict(state)
    assert fingerprint(buffer) == before


def test_other_things_than_states_are_refused():
    peer = TensorDictReplayBuffer(storage=LazyTensorStorage(100))
    peer.extend(content())
    for state in (peer.state_dict(), None, {"buffer": None}):
        with pytest.raises(ValueError, match=r"not one of FastReplayBuffer: state_dict\(\) makes them"):
            make().load_state_dict(state)
