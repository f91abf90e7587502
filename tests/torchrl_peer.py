"""Transitions as tensordicts, and TorchRL's own buffer, with which the drop-in is compared."""

import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from covr_fast.integrations.torchrl import FastReplayBuffer


def transitions(n=24, episode=6, width=(3,), dtype=torch.float32, **root) -> TensorDict:
    """[n] steps of one environment, observation t being next of t - 1; `root` has further entries."""
    states = torch.randn(n + 1, *width)
    states = (states * 40).to(dtype) if not dtype.is_floating_point else states.to(dtype)
    done = (torch.arange(n) % episode == episode - 1)[:, None]
    terminated = done & (torch.arange(n) % (2 * episode) < episode)[:, None]
    following = {
        "observation": states[1:],
        "reward": torch.randn(n, 1),
        "done": done,
        "terminated": terminated,
        "truncated": done & ~terminated,
    }
    return TensorDict(
        {"observation": states[:-1], "action": torch.randn(n, 2), **root, "next": TensorDict(following, [n])},
        [n],
    )


def stacks_of(frames: torch.Tensor) -> torch.Tensor:
    """Stacks of three of the frames [n + 3, C, H, W], of which n + 1 exist."""
    return torch.cat([frames[:-2], frames[1:-1], frames[2:]], 1)


def stacked(frames: torch.Tensor) -> TensorDict:
    """Transitions whose observations stack these 27 frames."""
    data, stacks = transitions(), stacks_of(frames)
    data["observation"], data["next", "observation"] = stacks[:-1], stacks[1:].clone()
    return data


def make(capacity=1000, obs_keys=("observation",), **options) -> FastReplayBuffer:
    return FastReplayBuffer(capacity, obs_keys=obs_keys, seed=0, **options)


def assert_same(ours: TensorDict, theirs: TensorDict, ours_only=frozenset()) -> None:
    assert set(ours.keys(True)) - ours_only == set(theirs.keys(True)) - ours_only
    assert ours.batch_size == theirs.batch_size
    for key in set(theirs.keys(True)) - {"index"}:
        one, other = ours.get(key), theirs.get(key)
        if isinstance(other, torch.Tensor):
            assert (one.dtype, one.shape) == (other.dtype, other.shape), key
            assert torch.equal(one, other), key
        else:
            assert one.batch_size == other.batch_size, key


def assert_as_torchrl(buffer: FastReplayBuffer, *parts: TensorDict, ours_only=frozenset()) -> None:
    """The parts through both buffers: all of them come back, and so does every sampled row."""
    peer = TensorDictReplayBuffer(storage=LazyTensorStorage(1000))
    index = torch.cat([buffer.extend(part) for part in parts])
    for part in parts:
        peer.extend(part.reshape(-1).clone())
    assert_same(buffer[index], peer[:], ours_only)
    sample = buffer.sample(64)
    position = {number: i for i, number in enumerate(index.tolist())}
    drawn = [position[number] for number in sample["index"].tolist()]
    assert_same(sample, peer[drawn], ours_only)
