"""The TorchRL drop-in."""

import numpy as np
import pytest
import torch

pytest.importorskip("torchrl")
from buffer_oracle import StackedEnv
from tensordict import TensorDict
from torchrl_peer import assert_as_torchrl, make, transitions


def collect(envs, steps, traj_ids=None) -> TensorDict:
    """[E, T], as a collector gives it; `traj_ids` counts trajectories per environment."""
    rows = []
    for e, env in enumerate(envs):
        for _ in range(steps):
            obs, next_obs, terminated, truncated = env.step()
            row = {
                "pixels": torch.from_numpy(obs),
                "action": torch.randn(2),
                "step": torch.randn(3),
                "next": {
                    "pixels": torch.from_numpy(next_obs),
                    "reward": torch.randn(1),
                    "done": torch.tensor([terminated or truncated]),
                    "terminated": torch.tensor([terminated]),
                    "truncated": torch.tensor([truncated]),
                },
            }
            if traj_ids is not None:
                row["collector"] = {"traj_ids": torch.tensor(traj_ids[e])}
                traj_ids[e] += len(envs) * (terminated or truncated)
            rows.append(TensorDict(row))
    return torch.stack(rows).reshape(len(envs), steps)


@pytest.mark.filterwarnings("ignore:the tensordict .* does not say which")
@pytest.mark.parametrize("flat", ["no", "env major", "time major", "with traj ids"])
def test_what_goes_in_comes_out(flat):
    rng = np.random.default_rng(0)
    envs = [StackedEnv(rng, (2, 9, 7), 3, max_length=20) for _ in range(3)]
    buffer = make(600, obs_keys=("pixels",), num_envs=3, frame_stack=3)
    stored = {}
    traj_ids = [0, 1, 2] if flat == "with traj ids" else None
    for _ in range(5):
        batch = collect(envs, 30, traj_ids)
        parts = batch.unbind(1) if flat == "time major" else [batch if flat == "no" else batch.reshape(-1)]
        for part in parts:
            stored |= dict(zip(buffer.extend(part).tolist(), part.reshape(-1), strict=True))
    sample = buffer.sample(192)
    for i, index in enumerate(sample["index"].tolist()):
        for key, value in stored[index].items(True, True):
            assert torch.equal(sample[key][i], value), key
    frames = int(buffer.buffer.state_dict()["tensors"]["written.pixels"].sum())
    assert frames / len(stored) < (1.5 if flat == "env major" else 1.25)


def test_priorities():
    buffer = make(sampler="prioritized")
    buffer.extend(transitions(60))
    sample = buffer.sample(32)
    assert sample["priority_weight"].shape == (32,)
    sample["td_error"] = torch.zeros(32, 1)
    buffer.update_tensordict_priority(sample)
    rare = set(sample["index"].tolist())
    drawn = buffer.sample(1000)["index"].tolist()
    assert sum(index in rare for index in drawn) < 20
    uniform = make()
    uniform.extend(transitions())
    uniform.update_tensordict_priority(uniform.sample(4))  # nothing to do


@pytest.mark.filterwarnings("ignore:the tensordict .* does not say which")
def test_inside_a_trainer():
    from torchrl.trainers.trainers import ReplayBufferTrainer

    buffer = make(sampler="prioritized", num_envs=3)
    hook = ReplayBufferTrainer(replay_buffer=buffer, batch_size=16, flatten_tensordicts=True)
    for _ in range(3):
        hook.extend(torch.stack([transitions(10) for _ in range(3)]))
        sample = hook.sample(None)
        sample["td_error"] = torch.rand(16)
        hook.update_priority(sample)
    state = hook.state_dict()
    hook.load_state_dict(state)
    assert len(buffer) == 90


def test_errors():
    buffer = make(num_envs=2)
    with pytest.raises(IndexError, match="the buffer is empty"):
        buffer.sample(4)
    with pytest.raises(ValueError, match="of 3 environments, num_envs is 2"):
        buffer.extend(torch.stack([transitions() for _ in range(3)]))
    buffer.extend(torch.stack([transitions() for _ in range(2)]))
    with pytest.raises(ValueError, match="batch_size is needed"):
        buffer.sample()


@pytest.mark.parametrize("name", ["obs", "reward", "env_ids"])
def test_root_entries_may_have_any_name(name):
    assert_as_torchrl(make(), transitions(**{name: torch.randn(24, 2)}))
