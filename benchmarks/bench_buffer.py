"""The replay buffer against its peers: memory, speed, and whether the rows are right.

    python benchmarks/bench_buffer.py FILE.json          # measures, and leaves the table in FILE.md
    pytest benchmarks/bench_buffer.py -k two_threads     # that row alone: it needs two idle cores

Stacks of three 84x84 RGB frames, 8 environments, batches of 256, one thread unless the row says otherwise.
Every contestant runs in its own process, so that no allocator is shared, and is filled with the same
episodes. Its rows are compared with what was added. The table names each with its bytes per transition, and
with the number of sampled truncations at which next_obs is wrong. What cannot be imported is named with the
reason.
"""

import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bench_ops import shift_of_drq
from race import Function, main, race

from covr_fast import ReplayBuffer

ENVS, CAPACITY, BATCH, LENGTH, PAD = 8, 8000, 256, 50, 4
SHAPE = (9, 84, 84)
FRAME = 3 * 84 * 84
STACK = 3 * FRAME


class Episodes:
    """Endless truncated episodes of a few distinct frames. The reward is the number of the row."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.frames = rng.integers(0, 256, (64, ENVS, 3, 84, 84), dtype=np.uint8)

    def observation(self, episode: int, step: int) -> np.ndarray:
        ages = [max(step - age, 0) for age in (2, 1, 0)]
        return np.concatenate([self.frames[(7 * episode + age) % 64] for age in ages], axis=1)

    def row(self, t: int) -> tuple[np.ndarray, np.ndarray, bool]:
        episode, step = divmod(t, LENGTH)
        return self.observation(episode, step), self.observation(episode, step + 1), step == LENGTH - 1


# ---- the contestants: nbytes, add(...), sample() -> (obs, next_obs, reward) ----

ACTION, NO = np.zeros((ENVS, 6), np.float32), np.zeros(ENVS, bool)


class Ours:
    def __init__(self) -> None:
        self.buffer = ReplayBuffer(
            CAPACITY, num_envs=ENVS, obs_shape=SHAPE, action_shape=(6,), frame_stack=3, seed=0
        )
        self.nbytes = self.buffer.nbytes

    def add(self, obs, next_obs, reward, truncated):
        self.buffer.add(obs, ACTION, reward, next_obs, NO, NO | truncated)

    def sample(self):
        batch = self.buffer.sample(BATCH, dtype=torch.uint8)
        return batch.obs, batch.next_obs, batch.reward


class NumpyRing:
    """What everybody writes first."""

    def __init__(self) -> None:
        self.obs = np.zeros((CAPACITY, *SHAPE), np.uint8)
        self.next_obs = np.zeros_like(self.obs)
        self.action, self.reward = np.zeros((CAPACITY, 6), np.float32), np.zeros(CAPACITY, np.float32)
        self.done = np.zeros(CAPACITY, bool)
        self.at, self.rng = 0, np.random.default_rng(0)
        self.nbytes = self.obs.nbytes + self.next_obs.nbytes + self.action.nbytes

    def add(self, obs, next_obs, reward, truncated):
        here = slice(self.at, self.at + ENVS)
        self.obs[here], self.next_obs[here], self.reward[here] = obs, next_obs, reward
        self.done[here], self.action[here] = truncated, 0
        self.at = (self.at + ENVS) % CAPACITY

    def sample(self):
        i = self.rng.integers(0, CAPACITY, BATCH)
        self.action[i], self.done[i]
        return tuple(torch.from_numpy(column[i]) for column in (self.obs, self.next_obs, self.reward))


class StableBaselines3:
    def __init__(self, **options) -> None:
        import gymnasium as gym
        from stable_baselines3.common.buffers import ReplayBuffer as Peer

        space, action = gym.spaces.Box(0, 255, SHAPE, np.uint8), gym.spaces.Box(-1, 1, (6,))
        self.buffer = Peer(CAPACITY, space, action, "cpu", ENVS, **options)
        self.nbytes = self.buffer.observations.nbytes * (1 if options else 2)

    def add(self, obs, next_obs, reward, truncated):
        infos = [{"TimeLimit.truncated": truncated}] * ENVS
        self.buffer.add(obs, next_obs, ACTION, reward, NO | truncated, infos)

    def sample(self):
        batch = self.buffer.sample(BATCH)
        return batch.observations, batch.next_observations, batch.rewards[:, 0]


class Tianshou:
    """Frames once, stacks rebuilt by the buffer."""

    nbytes = CAPACITY * (FRAME + 32)

    def __init__(self) -> None:
        from tianshou.data import Batch, VectorReplayBuffer

        self.row = Batch
        self.buffer = VectorReplayBuffer(
            CAPACITY, ENVS, stack_num=3, save_only_last_obs=True, ignore_obs_next=True
        )

    def add(self, obs, next_obs, reward, truncated):
        frames = {"obs": obs.reshape(ENVS, 3, 3, 84, 84), "obs_next": next_obs.reshape(ENVS, 3, 3, 84, 84)}
        ends = {"terminated": NO, "truncated": NO | truncated}
        self.buffer.add(self.row(**frames, **ends, act=ACTION, rew=reward, info=self.row()))

    def sample(self):
        batch, _ = self.buffer.sample(BATCH)
        obs, next_obs = (torch.from_numpy(x.reshape(BATCH, *SHAPE)) for x in (batch.obs, batch.obs_next))
        return obs, next_obs, torch.from_numpy(batch.rew)


class Cpprb:
    nbytes = CAPACITY * (2 * STACK + 32)

    def __init__(self) -> None:
        import cpprb

        entries = {name: {"shape": SHAPE, "dtype": np.uint8} for name in ("obs", "next_obs")}
        self.buffer = cpprb.ReplayBuffer(CAPACITY, {**entries, "act": {"shape": 6}, "rew": {}, "done": {}})

    def add(self, obs, next_obs, reward, truncated):
        self.buffer.add(obs=obs, next_obs=next_obs, act=ACTION, rew=reward, done=NO | truncated)

    def sample(self):
        batch = self.buffer.sample(BATCH)
        return tuple(torch.from_numpy(batch[name]) for name in ("obs", "next_obs", "rew"))


class CpprbCompressed:
    """next_of and stack_compress follow one stream of steps and stack along the last axis: one buffer per
    environment."""

    nbytes = CAPACITY * (FRAME + 32)

    def __init__(self) -> None:
        import cpprb

        obs = {"shape": (FRAME, 3), "dtype": np.uint8}
        entries = {"obs": obs, "act": {"shape": 6}, "rew": {}, "done": {}}
        options = {"next_of": "obs", "stack_compress": "obs"}
        self.buffers = [cpprb.ReplayBuffer(CAPACITY // ENVS, entries, **options) for _ in range(ENVS)]

    def add(self, obs, next_obs, reward, truncated):
        for env, buffer in enumerate(self.buffers):
            one, other = (x[env].reshape(3, FRAME).T for x in (obs, next_obs))
            buffer.add(obs=one, next_obs=other, act=np.zeros(6), rew=reward[env], done=False)
            if truncated:
                buffer.on_episode_end()

    def sample(self):
        parts = [buffer.sample(BATCH // ENVS) for buffer in self.buffers]
        obs, next_obs = (
            torch.from_numpy(np.concatenate([part[name].transpose(0, 2, 1) for part in parts]))
            for name in ("obs", "next_obs")
        )
        reward = torch.from_numpy(np.concatenate([part["rew"] for part in parts]))
        return obs.view(BATCH, *SHAPE), next_obs.view(BATCH, *SHAPE), reward


class TorchRL:
    nbytes = CAPACITY * (2 * STACK + 32)

    def __init__(self) -> None:
        from tensordict import TensorDict
        from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

        self.tensordict = TensorDict
        self.buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(CAPACITY), batch_size=BATCH)

    def add(self, obs, next_obs, reward, truncated):
        following = {"pixels": torch.from_numpy(next_obs), "reward": torch.from_numpy(reward)[:, None]}
        row = {"pixels": torch.from_numpy(obs), "action": torch.zeros(ENVS, 6), "next": following}
        self.buffer.extend(self.tensordict(row, batch_size=[ENVS]))

    def sample(self):
        batch = self.buffer.sample()
        return batch["pixels"], batch["next", "pixels"], batch["next", "reward"][:, 0]


CONTESTANTS = {
    "ours": Ours,
    "numpy ring": NumpyRing,
    "SB3": StableBaselines3,
    "SB3 optimize_memory_usage": partial(
        StableBaselines3, optimize_memory_usage=True, handle_timeout_termination=False
    ),
    "tianshou stack_num": Tianshou,
    "cpprb": Cpprb,
    "cpprb next_of + stack_compress": CpprbCompressed,
    "TorchRL": TorchRL,
}


def filled(name: str):
    buffer, episodes = CONTESTANTS[name](), Episodes()
    for t in range(CAPACITY // ENVS):
        obs, next_obs, truncated = episodes.row(t)
        buffer.add(obs, next_obs, np.arange(ENVS, dtype=np.float32) + t * ENVS, truncated)
    return buffer


def described(name: str, buffer) -> str:
    """Name, memory and correctness. Raises where a row is wrong in anything but next_obs at a truncation."""
    episodes, wrong, seen = Episodes(), 0, 0
    for _ in range(20):
        obs, next_obs, reward = buffer.sample()
        for i, number in enumerate(reward.long().reshape(-1).tolist()):
            t, env = divmod(number, ENVS)
            expected_obs, expected_next, truncated = episodes.row(t)
            if not truncated and i % 16:
                continue
            right = np.array_equal(next_obs[i].numpy(), expected_next[env])
            assert np.array_equal(obs[i].numpy(), expected_obs[env]), f"{name}: obs of step {t} is wrong"
            assert right or truncated, f"{name}: next_obs of step {t} is wrong"
            seen, wrong = seen + truncated, wrong + (truncated and not right)
    memory = buffer.nbytes / CAPACITY / 1000
    return f"{name} ({memory:.1f} kB, next_obs wrong at {wrong} of {seen} truncations)"


# ---- random shift as others do it, to float32 in [0, 1] ----


def slices_of_floats(obs: torch.Tensor) -> torch.Tensor:
    """As usually written: to float, pad all, then slice each."""
    padded = F.pad(obs.float() / 255, (PAD,) * 4, mode="replicate")
    y, x = np.random.default_rng(0).integers(0, 2 * PAD + 1, (2, len(obs)))
    return torch.stack([p[:, a : a + 84, b : b + 84] for p, a, b in zip(padded, y, x, strict=True)])


def slices_of_bytes(obs: torch.Tensor) -> torch.Tensor:
    """The same on bytes, a quarter of the memory; one cast at the end."""
    edges = ((0, 0), (0, 0), (PAD, PAD), (PAD, PAD))
    padded, out = np.pad(obs.numpy(), edges, mode="edge"), np.empty(obs.shape, np.uint8)
    y, x = np.random.default_rng(0).integers(0, 2 * PAD + 1, (2, len(obs)))
    for i, (a, b) in enumerate(zip(y, x, strict=True)):
        out[i] = padded[i, :, a : a + 84, b : b + 84]
    return torch.from_numpy(out).float().div_(255)


def grid_sample(obs: torch.Tensor) -> torch.Tensor:
    return shift_of_drq(obs, torch.randint(0, 2 * PAD + 1, (len(obs), 2)), PAD)


SHIFTS = {
    "numpy ring + slices of floats": slices_of_floats,
    "numpy ring + slices of bytes": slices_of_bytes,
    "numpy ring + grid_sample": grid_sample,
}


def check_shift(buffer: ReplayBuffer) -> None:
    batch = buffer.sample(64, augment="shift", pad=PAD)
    padded = F.pad(buffer.observations(batch.index).float() / 255, (PAD,) * 4, mode="replicate")
    for i, (y, x) in enumerate(batch.obs_offset.tolist()):
        assert torch.equal(batch.obs[i], padded[i, :, y : y + 84, x : x + 84])


# ---- random translation as others do it, to float32 in [0, 1] ----


def pad_and_gather(obs: torch.Tensor) -> torch.Tensor:
    """All at once: on black by twice the padding, of which each picture takes its window."""
    size, at = 84 + 2 * PAD, torch.randint(0, 2 * PAD + 1, (2, len(obs), 1))
    padded = F.pad(obs, (2 * PAD,) * 4)
    y, x = at + torch.arange(size)
    every = torch.arange(len(obs))[:, None, None]
    return padded[every, :, y[:, :, None], x[:, None]].permute(0, 3, 1, 2).float().div_(255)


def one_by_one(obs: torch.Tensor) -> torch.Tensor:
    """Into zeros, picture after picture, as bytes; one cast at the end."""
    size, pictures = 84 + 2 * PAD, obs.numpy()
    out = np.zeros((len(obs), obs.shape[1], size, size), np.uint8)
    places = np.random.default_rng(0).integers(0, 2 * PAD + 1, (len(obs), 2))
    for to, picture, (y, x) in zip(out, pictures, places, strict=True):
        to[:, y : y + 84, x : x + 84] = picture
    return torch.from_numpy(out).float().div_(255)


TRANSLATIONS = {
    "numpy ring + F.pad and gather": pad_and_gather,
    "numpy ring + picture by picture": one_by_one,
}


def check_translation(buffer: ReplayBuffer) -> None:
    batch = buffer.sample(64, augment="translate", pad=PAD)
    expected = torch.zeros_like(batch.obs)
    for to, picture, (y, x) in zip(
        expected, buffer.observations(batch.index), batch.obs_offset.tolist(), strict=True
    ):
        to[:, y : y + 84, x : x + 84] = picture.float() / 255
    assert torch.equal(batch.obs, expected)


# ---- jobs: name -> (how it is called in the table, the function that is timed), made in its own process ----

Job = Callable[[str], tuple[str, Function]]


def sampling(name: str) -> tuple[str, Function]:
    buffer = filled(name)
    return described(name, buffer), buffer.sample


def plain_copy(name: str) -> tuple[str, Function]:
    rng = np.random.default_rng(0)
    source = [torch.from_numpy(rng.integers(0, 256, (2, BATCH, *SHAPE), dtype=np.uint8)) for _ in range(8)]
    out, turn = torch.empty_like(source[0]), iter(range(10**9))
    return name, lambda: out.copy_(source[next(turn) % 8])


def shifting(name: str) -> tuple[str, Function]:
    if name == "ours":
        ours = filled(name).buffer
        check_shift(ours)
        return name, partial(ours.sample, BATCH, augment="shift", pad=PAD, dtype=torch.float32)
    ring, shift = filled("numpy ring"), SHIFTS[name]
    return name, lambda: [shift(obs) for obs in ring.sample()[:2]]


def translating(name: str) -> tuple[str, Function]:
    if name == "ours":
        ours = filled(name).buffer
        check_translation(ours)
        return name, partial(ours.sample, BATCH, augment="translate", pad=PAD, dtype=torch.float32)
    ring, translation = filled("numpy ring"), TRANSLATIONS[name]
    return name, lambda: [translation(obs) for obs in ring.sample()[:2]]


def adding(name: str) -> tuple[str, Function]:
    """1000 vector steps per call: 100 different ones, ten times."""
    buffer, episodes = filled(name), Episodes()
    rows = [(*episodes.row(t), np.zeros(ENVS, np.float32)) for t in range(2 * LENGTH)]

    def run() -> None:
        for obs, next_obs, truncated, reward in 10 * rows:
            buffer.add(obs, next_obs, reward, truncated)

    return name, run


def threaded(name: str, dtype: torch.dtype) -> tuple[str, Function]:
    torch.set_num_threads(1 if name == "1 thread" else 2)
    if name in ("1 thread", "2 threads"):
        return name, partial(filled("ours").buffer.sample, BATCH, augment="shift", pad=PAD, dtype=dtype)
    out = [torch.empty(BATCH, *SHAPE, dtype=dtype) for _ in range(2)]
    return name, lambda: [tensor.fill_(1) for tensor in out]


def prioritized(name: str) -> tuple[str, Function]:
    """sample and update_priorities, 100 times per call."""
    size, rng, rows = 1_000_000, np.random.default_rng(0), 1000
    priorities = rng.random(BATCH)
    obs, zero, no = np.zeros((rows, 1), np.float32), np.zeros(rows, np.float32), np.zeros(rows, bool)
    if name == "ours":
        ours = ReplayBuffer(
            size, num_envs=rows, obs_shape=(1,), action_shape=(), sampler="prioritized", seed=0
        )
        for _ in range(size // rows):
            ours.update_priorities(ours.add(obs, zero, zero, obs, no, no), rng.random(rows))

        def once() -> None:
            ours.update_priorities(ours.sample(BATCH).index, priorities)
    elif name == "cpprb":
        import cpprb

        fields = {"obs": obs, "act": zero, "rew": zero, "next_obs": obs, "done": no}
        peer = cpprb.PrioritizedReplayBuffer(size, {field: {} for field in fields})
        for _ in range(size // rows):
            peer.add(**fields, priorities=rng.random(rows))

        def once() -> None:
            peer.update_priorities(peer.sample(BATCH)["indexes"], priorities)
    else:
        from tensordict import TensorDict
        from torchrl.data import LazyTensorStorage, PrioritizedSampler, TensorDictReplayBuffer

        column, values = torch.zeros(size, 1), torch.from_numpy(priorities).float()
        sampler = PrioritizedSampler(size, alpha=0.6, beta=0.4)
        torchrl = TensorDictReplayBuffer(
            storage=LazyTensorStorage(size), sampler=sampler, batch_size=BATCH, priority_key="td_error"
        )
        fields = dict.fromkeys(("obs", "act", "rew", "next_obs", "done"), column)
        torchrl.extend(TensorDict(fields, batch_size=[size]))

        def once() -> None:
            batch = torchrl.sample()
            batch["td_error"] = values
            torchrl.update_tensordict_priority(batch)

    return name, lambda: [once() for _ in range(100)]


# ---- the races, each contestant in its own process ----


def prepare(job: Job, name: str) -> tuple[str, str | None]:
    """In the contestant's process: makes it. Returns how it is called, and the reason if it cannot run."""
    global timed_function
    torch.set_num_threads(1)
    try:
        label, timed_function = job(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: TorchRL's extension did not load
        return name, " ".join(str(error).split())[:120]
    return label, None


def timed_call() -> float:
    """In the contestant's process: seconds of one call."""
    global batch  # as in a training loop, the batch before lives until this one is made
    begin = time.perf_counter()
    batch = timed_function()
    return time.perf_counter() - begin


def compare(benchmark, jobs: dict[str, Job], *, rounds: int, items: int, limit: str | None = None) -> None:
    """Races the jobs. `items` are the transitions of one call; `limit` names what the hardware allows."""
    functions: dict[str, Callable[[], float] | str] = {}
    with ExitStack() as stack:
        for name, job in jobs.items():
            process = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
            label, why = process.submit(prepare, job, name).result()
            functions[label] = why or (lambda process=process: process.submit(timed_call).result())
        # Two warm-ups: the third batch is the first that can use the memory of an earlier one again.
        result = race(functions, rounds, lambda call: call(), warmups=2, benchmark=benchmark)
    benchmark.extra_info.update(result, items=items, limit=result["seconds"].get(limit))


def test_sample_uint8(benchmark):
    jobs = {**dict.fromkeys(CONTESTANTS, sampling), "plain copy of a batch": plain_copy}
    compare(benchmark, jobs, rounds=30, items=BATCH, limit="plain copy of a batch")


def test_sample_float32_with_shift(benchmark):
    compare(benchmark, dict.fromkeys(["ours", *SHIFTS], shifting), rounds=7, items=BATCH)


def test_sample_float32_with_translation(benchmark):
    compare(benchmark, dict.fromkeys(["ours", *TRANSLATIONS], translating), rounds=7, items=BATCH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_two_threads(benchmark, dtype):
    fill = "fill_ of as many bytes"
    jobs = dict.fromkeys(["2 threads", "1 thread", fill], partial(threaded, dtype=dtype))
    compare(benchmark, jobs, rounds=20, items=BATCH, limit=fill)


def test_add_1000_steps_of_8(benchmark):
    compare(benchmark, dict.fromkeys(CONTESTANTS, adding), rounds=5, items=1000 * ENVS)


def test_prioritized_1e6_entries_100_times(benchmark):
    compare(benchmark, dict.fromkeys(["ours", "cpprb", "TorchRL"], prioritized), rounds=15, items=100 * BATCH)


if __name__ == "__main__":
    raise SystemExit(main(__file__, Path(sys.argv[1])))
