"""The TorchRL drop-in."""

import numpy as np
import pytest
import torch

pytest.importorskip("torchrl")
from buffer_oracle import StackedEnv
from tensordict import TensorDict

from covr_fast.integrations.torchrl import FastReplayBuffer


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


def make(num_envs=3, capacity=600, n_frames=3, **options):
    rng = np.random.default_rng(0)
    envs = [StackedEnv(rng, (2, 9, 7), n_frames, max_length=20) for _ in range(num_envs)]
    buffer = FastReplayBuffer(
        capacity, num_envs=num_envs, frame_stack=n_frames, batch_size=64, seed=0, **options
    )
    return envs, buffer


def assert_rows(buffer, sample, stored: dict[int, TensorDict]):
    for i, index in enumerate(sample["index"].tolist()):
        row = stored[index]
        for key in ("pixels", "action", "step", ("next", "pixels"), ("next", "reward"), ("next", "done")):
            assert torch.equal(sample[key][i], row[key]), key
        assert torch.equal(sample["next", "terminated"][i], row["next", "terminated"])
        assert torch.equal(sample["next", "truncated"][i], row["next", "truncated"])


@pytest.mark.filterwarnings("ignore:the tensordict .* does not say which")
@pytest.mark.parametrize("flat", ["no", "env major", "time major", "with traj ids"])
def test_what_goes_in_comes_out(flat):
    envs, buffer = make()
    stored = {}
    traj_ids = [0, 1, 2] if flat == "with traj ids" else None
    for _ in range(5):
        batch = collect(envs, 30, traj_ids)
        if flat == "time major":
            for step in batch.unbind(1):
                stored |= dict(zip(buffer.extend(step).tolist(), step, strict=True))
            continue
        index = buffer.extend(batch if flat == "no" else batch.reshape(-1))
        stored |= dict(zip(index.tolist(), batch.reshape(-1), strict=True))
    for _ in range(3):
        assert_rows(buffer, buffer.sample(), stored)
    frames = int(buffer.buffer._storage.tensors["written.pixels"].sum())
    per_transition = frames / len(stored)
    assert per_transition < (1.5 if flat == "env major" else 1.25)


def test_priorities():
    envs, buffer = make(sampler="prioritized")
    buffer.extend(collect(envs, 20))
    sample = buffer.sample(32)
    assert sample["priority_weight"].shape == (32,)
    sample["td_error"] = torch.zeros(32, 1)
    buffer.update_tensordict_priority(sample)
    rare = set(sample["index"].tolist())
    drawn = buffer.sample(1000)["index"].tolist()
    assert sum(index in rare for index in drawn) < 20
    _, uniform = make()
    uniform.extend(collect(envs, 5))
    uniform.update_tensordict_priority(uniform.sample(4))  # nothing to do


def test_n_steps_tell_their_length():
    envs, buffer = make(n_step=3)
    buffer.extend(collect(envs, 30))
    sample = buffer.sample(256)
    steps = sample["steps_to_next_obs"]
    assert steps.shape == (256, 1)
    assert ((steps == 3) | sample["next", "done"]).all()
    assert (steps < 3).any()


def test_state_and_pickle_free_restore():
    envs, buffer = make()
    buffer.extend(collect(envs, 20))
    again = make()[1]
    again.load_state_dict(buffer.state_dict())
    a, b = buffer.sample(), again.sample()
    assert (a == b).all()
    batch = collect(envs, 5)
    assert torch.equal(buffer.extend(batch), again.extend(batch))


@pytest.mark.filterwarnings("ignore:the tensordict .* does not say which")
def test_inside_a_trainer():
    from torchrl.trainers.trainers import ReplayBufferTrainer

    envs, buffer = make(sampler="prioritized")
    hook = ReplayBufferTrainer(replay_buffer=buffer, batch_size=16, flatten_tensordicts=True)
    for _ in range(3):
        hook.extend(collect(envs, 10))
        sample = hook.sample(None)
        sample["td_error"] = torch.rand(16)
        hook.update_priority(sample)
    state = hook.state_dict()
    hook.load_state_dict(state)
    assert len(buffer) == 90


def test_errors():
    envs, buffer = make(num_envs=2)
    with pytest.raises(IndexError, match="the buffer is empty"):
        buffer.sample()
    with pytest.raises(ValueError, match="of 3 environments, num_envs is 2"):
        buffer.extend(collect([*envs, envs[0]], 4))
    buffer.extend(collect(envs, 4))
    buffer.batch_size = None
    with pytest.raises(ValueError, match="batch_size is needed"):
        buffer.sample()


@pytest.mark.parametrize("name", ["obs", "reward", "env_ids"])
def test_root_entries_may_have_any_name(name):
    envs, buffer = make()
    batch = collect(envs, 5)
    batch[name] = torch.randn(3, 5, 2)
    index = buffer.extend(batch)
    stored = dict(zip(index.tolist(), batch[name].reshape(-1, 2), strict=True))
    sample = buffer.sample()
    for i, value in zip(sample["index"].tolist(), sample[name], strict=True):
        assert torch.equal(value, stored[i])
