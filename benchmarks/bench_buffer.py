"""The replay buffer against its peers: memory, speed, and whether the rows are right.

    pytest benchmarks/bench_buffer.py --benchmark-only --benchmark-group-by=group

Stacks of three 84x84 RGB frames, 8 environments, one thread, batches of 256. Every peer is filled with the
same episodes; its sampled rows are compared with what was added, and the outcome stands beside its speed as
`next_obs_wrong` (rows with a wrong next_obs, of those sampled at truncations). A peer that cannot be imported
is skipped with the reason.
"""

import numpy as np
import pytest
import torch

from covr_fast import ReplayBuffer

ENVS, CAPACITY, BATCH, LENGTH, PAD = 8, 8000, 256, 50, 4
SHAPE = (9, 84, 84)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Episodes:
    """Endless truncated episodes of a few distinct frames. The reward is the step's number: it names the
    row."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.frames = rng.integers(0, 256, (64, ENVS, 3, 84, 84), dtype=np.uint8)

    def observation(self, episode: int, step: int) -> np.ndarray:
        ages = [max(step - age, 0) for age in (2, 1, 0)]
        return np.concatenate([self.frames[(7 * episode + age) % 64] for age in ages], axis=1)

    def row(self, t: int) -> tuple[np.ndarray, np.ndarray, bool]:
        episode, step = divmod(t, LENGTH)
        return self.observation(episode, step), self.observation(episode, step + 1), step == LENGTH - 1


class Ours:
    def __init__(self) -> None:
        self.buffer = ReplayBuffer(
            CAPACITY, num_envs=ENVS, obs_shape=SHAPE, action_shape=(6,), frame_stack=3, seed=0
        )
        self.action, self.no = np.zeros((ENVS, 6), np.float32), np.zeros(ENVS, bool)
        self.nbytes = self.buffer.nbytes

    def add(self, obs, next_obs, reward, truncated) -> None:
        self.buffer.add(obs, self.action, reward, next_obs, self.no, self.no | truncated)

    def sample(self):
        batch = self.buffer.sample(BATCH, dtype=torch.uint8)
        return batch.obs, batch.next_obs, batch.reward

    def sample_shifted(self):
        return self.buffer.sample(BATCH, augment="shift", pad=PAD, dtype=torch.float32).obs


class NumpyRing:
    """What everybody writes first."""

    def __init__(self) -> None:
        self.obs = np.zeros((CAPACITY, *SHAPE), np.uint8)
        self.next_obs = np.zeros_like(self.obs)
        self.action, self.reward = np.zeros((CAPACITY, 6), np.float32), np.zeros(CAPACITY, np.float32)
        self.done = np.zeros(CAPACITY, bool)
        self.at, self.rng = 0, np.random.default_rng(0)
        self.nbytes = self.obs.nbytes + self.next_obs.nbytes + self.action.nbytes

    def add(self, obs, next_obs, reward, truncated) -> None:
        here = slice(self.at, self.at + ENVS)
        self.obs[here], self.next_obs[here], self.reward[here], self.done[here] = (
            obs,
            next_obs,
            reward,
            truncated,
        )
        self.action[here] = 0
        self.at = (self.at + ENVS) % CAPACITY

    def sample(self):
        i = self.rng.integers(0, CAPACITY, BATCH)
        self.action[i], self.done[i]
        return (
            torch.from_numpy(self.obs[i]),
            torch.from_numpy(self.next_obs[i]),
            torch.from_numpy(self.reward[i]),
        )


class StableBaselines3:
    def __init__(self, **options) -> None:
        gym = pytest.importorskip("gymnasium")
        buffers = pytest.importorskip("stable_baselines3.common.buffers")
        space, action = gym.spaces.Box(0, 255, SHAPE, np.uint8), gym.spaces.Box(-1, 1, (6,))
        self.buffer = buffers.ReplayBuffer(CAPACITY, space, action, "cpu", ENVS, **options)
        self.action, self.infos = np.zeros((ENVS, 6), np.float32), {}
        self.nbytes = self.buffer.observations.nbytes
        if not options:
            self.nbytes += self.buffer.next_observations.nbytes

    def add(self, obs, next_obs, reward, truncated) -> None:
        infos = [{"TimeLimit.truncated": truncated}] * ENVS
        self.buffer.add(obs, next_obs, self.action, reward, np.full(ENVS, truncated), infos)

    def sample(self):
        batch = self.buffer.sample(BATCH)
        return batch.observations, batch.next_observations, batch.rewards[:, 0]


class StableBaselines3Optimized(StableBaselines3):
    def __init__(self) -> None:
        super().__init__(optimize_memory_usage=True, handle_timeout_termination=False)


class Cpprb:
    def __init__(self) -> None:
        cpprb = pytest.importorskip("cpprb")
        entries = {name: {"shape": SHAPE, "dtype": np.uint8} for name in ("obs", "next_obs")}
        self.buffer = cpprb.ReplayBuffer(CAPACITY, {**entries, "act": {"shape": 6}, "rew": {}, "done": {}})
        self.action = np.zeros((ENVS, 6), np.float32)
        self.nbytes = CAPACITY * (2 * int(np.prod(SHAPE)) + 32)

    def add(self, obs, next_obs, reward, truncated) -> None:
        done = np.full(ENVS, truncated)
        self.buffer.add(obs=obs, next_obs=next_obs, act=self.action, rew=reward, done=done)

    def sample(self):
        batch = self.buffer.sample(BATCH)
        return tuple(torch.from_numpy(batch[name]) for name in ("obs", "next_obs", "rew"))


class TorchRL:
    def __init__(self) -> None:
        data = pytest.importorskip("torchrl.data")
        self.tensordict = pytest.importorskip("tensordict").TensorDict
        self.buffer = data.TensorDictReplayBuffer(storage=data.LazyTensorStorage(CAPACITY), batch_size=BATCH)
        self.nbytes = CAPACITY * (2 * int(np.prod(SHAPE)) + 32)

    def add(self, obs, next_obs, reward, truncated) -> None:
        following = {"pixels": torch.from_numpy(next_obs), "reward": torch.from_numpy(reward)[:, None]}
        row = {"pixels": torch.from_numpy(obs), "action": torch.zeros(ENVS, 6), "next": following}
        self.buffer.extend(self.tensordict(row, batch_size=[ENVS]))

    def sample(self):
        batch = self.buffer.sample()
        return batch["pixels"], batch["next", "pixels"], batch["next", "reward"][:, 0]


PEERS = [Ours, NumpyRing, StableBaselines3, StableBaselines3Optimized, Cpprb, TorchRL]
EPISODES = Episodes()


def filled(kind):
    buffer = kind()
    for t in range(CAPACITY // ENVS):
        add(buffer, t)
    return buffer


def add(buffer, t: int) -> None:
    obs, next_obs, truncated = EPISODES.row(t)
    buffer.add(obs, next_obs, np.arange(ENVS, dtype=np.float32) + t * ENVS, truncated)


def wrong_rows(buffer) -> str:
    """Wrong next_obs of those sampled at truncations."""
    wrong = seen = 0
    for _ in range(20):
        obs, next_obs, reward = buffer.sample()
        for i, number in enumerate(reward.long().reshape(-1).tolist()):
            t, env = divmod(number, ENVS)
            expected_obs, expected_next, truncated = EPISODES.row(t)
            if not truncated:
                continue
            assert np.array_equal(obs[i].numpy(), expected_obs[env])
            seen += 1
            wrong += not np.array_equal(next_obs[i].numpy(), expected_next[env])
    return f"{wrong} of {seen}"


@pytest.mark.benchmark(group="sample uint8")
@pytest.mark.parametrize("kind", PEERS)
def test_sample(benchmark, kind):
    buffer = filled(kind)
    benchmark.extra_info["bytes_per_transition"] = buffer.nbytes // CAPACITY
    benchmark.extra_info["next_obs_wrong"] = wrong_rows(buffer)
    benchmark.pedantic(buffer.sample, rounds=20, warmup_rounds=3)
    benchmark.extra_info["transitions_per_second"] = round(BATCH / benchmark.stats.stats.median)


@pytest.mark.benchmark(group="sample uint8")
def test_plain_copy(benchmark):
    """The bytes of a batch, copied: the limit."""
    rng = np.random.default_rng(0)
    source = [torch.from_numpy(rng.integers(0, 256, (2, BATCH, *SHAPE), dtype=np.uint8)) for _ in range(8)]
    out, turn = torch.empty_like(source[0]), iter(range(10**9))
    benchmark.pedantic(lambda: out.copy_(source[next(turn) % 8]), rounds=20, warmup_rounds=3)
    benchmark.extra_info["transitions_per_second"] = round(BATCH / benchmark.stats.stats.median)


def slice_crop(obs: torch.Tensor) -> torch.Tensor:
    """Random shift as usually written: pad all, then slice each."""
    padded = torch.nn.functional.pad(obs.float() / 255, (PAD,) * 4, mode="replicate")
    y, x = np.random.default_rng(0).integers(0, 2 * PAD + 1, (2, len(obs)))
    return torch.stack([p[:, a : a + 84, b : b + 84] for p, a, b in zip(padded, y, x, strict=True)])


def grid_sample(obs: torch.Tensor) -> torch.Tensor:
    """Random shift by bilinear resampling at integer offsets, as DrQ-v2 does it."""
    size = 84 + 2 * PAD
    padded = torch.nn.functional.pad(obs.float() / 255, (PAD,) * 4, mode="replicate")
    line = torch.linspace(-1 + 1 / size, 1 - 1 / size, size)[:84]
    base = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    shift = torch.randint(0, 2 * PAD + 1, (len(obs), 1, 1, 2)) * (2.0 / size)
    return torch.nn.functional.grid_sample(padded, base + shift, padding_mode="zeros", align_corners=False)


@pytest.mark.benchmark(group="sample float32 with shift")
@pytest.mark.parametrize("pipeline", ["ours", "numpy + slices", "numpy + grid_sample"])
def test_sample_shifted(benchmark, pipeline):
    if pipeline == "ours":
        run = filled(Ours).sample_shifted
    else:
        ring = filled(NumpyRing)
        shift = slice_crop if "slices" in pipeline else grid_sample

        def run():
            obs, next_obs, _ = ring.sample()
            return shift(obs), shift(next_obs)

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    benchmark.extra_info["transitions_per_second"] = round(BATCH / benchmark.stats.stats.median)


@pytest.mark.benchmark(group="add")
@pytest.mark.parametrize("kind", PEERS)
def test_add(benchmark, kind):
    buffer = filled(kind)
    rows = [(*EPISODES.row(t), np.zeros(ENVS, np.float32)) for t in range(2 * LENGTH)]
    step = iter(range(10**9))

    def run():
        obs, next_obs, truncated, reward = rows[next(step) % len(rows)]
        buffer.add(obs, next_obs, reward, truncated)

    benchmark.pedantic(run, rounds=400, warmup_rounds=20)
    benchmark.extra_info["transitions_per_second"] = round(ENVS / benchmark.stats.stats.median)


@pytest.mark.benchmark(group="prioritized, 1e6 entries")
@pytest.mark.parametrize("kind", ["ours", "cpprb"])
def test_prioritized(benchmark, kind):
    size, rng = 1_000_000, np.random.default_rng(0)
    priorities = rng.random(BATCH)
    obs, zero, no = np.zeros((1000, 1), np.float32), np.zeros(1000, np.float32), np.zeros(1000, bool)
    if kind == "ours":
        buffer = ReplayBuffer(
            size, num_envs=1000, obs_shape=(1,), action_shape=(), sampler="prioritized", seed=0
        )
        for _ in range(size // 1000):
            index = buffer.add(obs, zero, zero, obs, no, no)
            buffer.update_priorities(index, rng.random(1000))

        def run():
            buffer.update_priorities(buffer.sample(BATCH).index, priorities)
    else:
        cpprb = pytest.importorskip("cpprb")
        peer = cpprb.PrioritizedReplayBuffer(
            size, {"obs": {}, "act": {}, "rew": {}, "next_obs": {}, "done": {}}
        )
        for _ in range(size // 1000):
            peer.add(obs=obs, act=zero, rew=zero, next_obs=obs, done=no, priorities=rng.random(1000))

        def run():
            peer.update_priorities(peer.sample(BATCH)["indexes"], priorities)

    benchmark.pedantic(run, rounds=300, warmup_rounds=20)
