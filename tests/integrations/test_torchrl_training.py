"""The drop-in among TorchRL's collectors, trainers, losses and n-step transforms."""

import threading

import gymnasium
import numpy as np
import pytest
import torch

pytest.importorskip("torchrl")
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import MultiStep
from torchrl.envs import CatFrames, GymWrapper, SerialEnv, StepCounter, TransformedEnv
from torchrl.modules import EGreedyModule, QValueModule
from torchrl.objectives import DQNLoss
from torchrl_peer import assert_as_torchrl, make, transitions


class Counter(gymnasium.Env):
    """Pixels that show how many steps the episode has; it ends with the seventh."""

    observation_space = gymnasium.spaces.Box(0, 255, (1, 6, 5), np.uint8)
    action_space = gymnasium.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        self.brightness = int(self.np_random.integers(1, 100))
        return self._picture(), {}

    def step(self, action):
        self.count += 1
        return self._picture(), float(action), self.count == 7, False, {}

    def _picture(self):
        return np.full((1, 6, 5), self.brightness + self.count, np.uint8)


def stacked_env():
    env = TransformedEnv(GymWrapper(Counter()), CatFrames(3, dim=-3, in_keys=["observation"]))
    return TransformedEnv(env, StepCounter(max_steps=5, step_count_key="steps"))


def two_envs():
    return SerialEnv(2, stacked_env)


def q_loss(width: int) -> DQNLoss:
    torch.manual_seed(0)
    body = TensorDictModule(nn.Linear(width, 3), ["observation"], ["action_value"])
    loss = DQNLoss(TensorDictSequential(body, QValueModule(action_space="one-hot")), action_space="one-hot")
    loss.make_value_estimator(gamma=0.9)
    return loss


def test_what_a_collector_gives_comes_back():
    buffer = make(num_envs=2, frame_stack=3)
    batches = [data.clone() for data in Collector(two_envs(), None, frames_per_batch=40, total_frames=160)]
    assert batches[0].shape == (2, 20)
    assert_as_torchrl(buffer, *batches)
    frames = int(buffer.buffer.state_dict()["tensors"]["written.observation"].sum())
    assert frames < 160 * 1.3  # an episode of 5 or fewer steps has one frame more


def test_a_collector_fills_the_buffer_itself():
    buffer = make(capacity=50, num_envs=2, frame_stack=3)
    collector = Collector(
        two_envs(),
        EGreedyModule(two_envs().action_spec),
        frames_per_batch=40,
        total_frames=120,
        replay_buffer=buffer,
        init_random_frames=60,
    )
    for written, nothing in enumerate(collector, 1):
        assert nothing is None
        assert buffer.write_count == 40 * written
    assert len(buffer) == 50
    sample = buffer.sample(16)
    assert sample["action"].dtype == torch.int64
    assert (sample["action"].sum(-1) == 1).all()


def test_worker_processes_cannot_write_into_it():
    from torchrl.collectors import MultiSyncCollector

    with pytest.raises(AttributeError, match=r"worker processes .*: extend\(\) it with what the collector"):
        MultiSyncCollector(
            [stacked_env], None, frames_per_batch=10, total_frames=10, replay_buffer=make(frame_stack=3)
        )


def decisions(n=60):
    data = transitions(n)
    data["action"] = nn.functional.one_hot(torch.arange(n) % 3, 3)
    return data


def test_a_loss_reads_samples_as_it_reads_torchrls():
    data, loss = decisions(), q_loss(3)
    buffer = make(sampler="prioritized")
    buffer.extend(data)
    sample = buffer.sample(32)
    same = data[sample["index"]].clone()
    ours, theirs = loss(sample)["loss"], loss(same)["loss"]
    assert torch.equal(ours, theirs)
    ours.backward()
    assert all(p.grad.abs().sum() > 0 for p in loss.parameters() if p.requires_grad)
    assert torch.equal(sample["td_error"], same["td_error"])
    buffer.update_tensordict_priority(sample)


@pytest.mark.parametrize("n_step", [2, 3])
def test_n_steps_are_those_of_multi_step(n_step):
    data, loss = decisions(), q_loss(3)
    steps = MultiStep(gamma=0.9, n_steps=n_step)(data.clone().reshape(1, -1)).reshape(-1)
    buffer = make(n_step=n_step, gamma=0.9)
    buffer.extend(data)
    sample = buffer.sample(64)
    peer = steps[sample["index"]]
    assert torch.equal(sample["next", "observation"], peer["next", "observation"])
    assert torch.allclose(sample["next", "reward"], peer["next", "reward"])
    assert torch.equal(sample["steps_to_next_obs"][:, 0], peer["steps_to_next_obs"])
    # MultiStep leaves the ends where they were; those of the last step are what the target needs.
    last = data["next"][sample["index"] + peer["steps_to_next_obs"] - 1]
    for name in ("done", "terminated", "truncated"):
        peer["next", name] = last[name]
    assert torch.allclose(loss(sample)["loss"], loss(peer)["loss"])


def test_priorities_at_extend_and_of_several_values():
    data = transitions()
    data["agent", "error"] = torch.zeros(24, 2, 1)
    data["agent", "error"][7, 1] = -5
    buffer = make(sampler="prioritized", priority_key=("agent", "error"))
    index = buffer.extend(data)
    drawn = buffer.sample(200)
    assert (drawn["index"] == index[7]).float().mean() > 0.95
    drawn["agent", "error"] = torch.where(drawn["index"] == index[7], 0.0, 1.0)[:, None, None].expand(
        -1, 2, 1
    )
    buffer.update_tensordict_priority(drawn)
    buffer.update_priority(index[:7], torch.full((7,), 5.0))
    assert (buffer.sample(200)["index"] < index[7]).float().mean() > 0.9


def test_priorities_that_are_none():
    buffer = make(sampler="prioritized")
    buffer.extend(transitions())
    sample = buffer.sample(8)
    with pytest.warns(UserWarning, match="lacks priority_key='td_error': priorities stay"):
        buffer.update_tensordict_priority(sample)
    sample["td_error"] = torch.full((8, 1), torch.nan)
    with pytest.raises(ValueError, match="'td_error' is NaN or infinite"):
        buffer.update_tensordict_priority(sample)
    sample["td_error"] = torch.ones(8)
    with pytest.raises(ValueError, match='lacks "index"'):
        buffer.update_tensordict_priority(sample.exclude("index"))
    with pytest.raises(ValueError, match="'td_error' is NaN or infinite"):
        make(sampler="prioritized").extend(transitions(td_error=torch.full((24,), torch.inf)))


def test_samples_can_be_stored_again():
    buffer, again = make(sampler="prioritized", n_step=2), make(sampler="prioritized", n_step=2)
    buffer.extend(transitions())
    sample = buffer.sample(16)
    index = again.extend(sample)
    assert torch.equal(again[index]["observation"], sample["observation"])
    assert torch.equal(again[index]["index"], index)


def test_iteration_length_rows_and_emptying():
    buffer = make(batch_size=5)
    assert (len(buffer), buffer.write_count) == (0, 0)
    data = transitions(extra=torch.randn(24, 2))
    index = buffer.extend(data[:20])
    assert buffer.add(data[20]).shape == ()
    assert (len(buffer), buffer.write_count) == (21, 21)
    for _, sample in zip(range(3), buffer, strict=False):
        assert sample.shape == (5,)
    assert torch.equal(buffer[index[3]]["extra"], data["extra"][3])
    assert torch.equal(buffer[[4, 2]]["extra"], data["extra"][[4, 2]])
    assert buffer[index[:6].reshape(2, 3)].shape == (2, 3)
    for wrong in (slice(None), "extra", ("next", "reward")):
        with pytest.raises(TypeError, match="it must be ids"):
            buffer[wrong]
    with pytest.raises(IndexError, match="never added"):
        buffer[99]
    with pytest.raises(ValueError, match=r"add\(\) got a tensordict \[24\]: extend\(\)"):
        buffer.add(data)
    buffer.empty()
    assert (len(buffer), buffer.write_count) == (0, 0)
    buffer.extend(transitions(other=torch.ones(24)))
    assert buffer.sample()["other"].sum() == 5


def test_samples_while_another_thread_extends():
    buffer = make(capacity=40, n_step=3)
    buffer.extend(transitions())
    stop = threading.Event()

    def fill():
        while not stop.is_set():
            buffer.extend(transitions())

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        for _ in range(300):
            sample = buffer.sample(16)
            assert sample.shape == (16,)
    finally:
        stop.set()
        thread.join()
