"""The replay buffer against its peers: memory, speed, and whether the rows are right.

    pytest benchmarks/bench_buffer.py --benchmark-json=benchmarks/results/buffer_cpu.json
    python benchmarks/bench_buffer.py benchmarks/results/buffer_cpu.json    # the table, as Markdown
    pytest benchmarks/bench_buffer.py -k two_threads     # that row alone: it needs two idle cores

Stacks of three 84x84 RGB frames, 8 environments, batches of 256, one thread unless the row says otherwise.
Every contender lives in a process of its own, so that none profits or suffers from what another left in its
allocator, is filled with the same episodes, and is timed in turn with the others, round by round, so that a
busy machine is busy for all of them. Its rows are compared with what was added, and the outcome stands beside
its name: bytes per transition, and at how many of the sampled truncations next_obs is wrong. What cannot be
imported is named with the reason.
"""

import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from covr_fast import ReplayBuffer

ENVS, CAPACITY, BATCH, LENGTH, PAD = 8, 8000, 256, 50, 4
SHAPE = (9, 84, 84)
FRAME = 3 * 84 * 84


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


# --- The contenders


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
        batch = self.buffer.sample(BATCH, augment="shift", pad=PAD, dtype=torch.float32)
        return batch.obs, batch.next_obs


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
        self.obs[here], self.next_obs[here], self.reward[here] = obs, next_obs, reward
        self.done[here], self.action[here] = truncated, 0
        self.at = (self.at + ENVS) % CAPACITY

    def sample(self):
        i = self.rng.integers(0, CAPACITY, BATCH)
        self.action[i], self.done[i]
        return tuple(torch.from_numpy(column[i]) for column in (self.obs, self.next_obs, self.reward))

    def sample_sliced(self):
        return tuple(slice_crop(obs) for obs in self.sample()[:2])

    def sample_sliced_bytes(self):
        return tuple(slice_crop_bytes(obs) for obs in self.sample()[:2])

    def sample_resampled(self):
        return tuple(grid_sample(obs) for obs in self.sample()[:2])


class StableBaselines3:
    def __init__(self, **options) -> None:
        import gymnasium as gym
        from stable_baselines3.common.buffers import ReplayBuffer as Peer

        space, action = gym.spaces.Box(0, 255, SHAPE, np.uint8), gym.spaces.Box(-1, 1, (6,))
        self.buffer = Peer(CAPACITY, space, action, "cpu", ENVS, **options)
        self.action = np.zeros((ENVS, 6), np.float32)
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


class Tianshou:
    """Frames once, stacks rebuilt by the buffer."""

    def __init__(self) -> None:
        from tianshou.data import Batch, VectorReplayBuffer

        self.row = Batch
        self.buffer = VectorReplayBuffer(
            CAPACITY, ENVS, stack_num=3, save_only_last_obs=True, ignore_obs_next=True
        )
        self.nbytes = CAPACITY * (FRAME + 32)

    def add(self, obs, next_obs, reward, truncated) -> None:
        ends, no, action = np.full(ENVS, truncated), np.zeros(ENVS, bool), np.zeros((ENVS, 6), np.float32)
        stacks = {"obs": obs.reshape(ENVS, 3, 3, 84, 84), "obs_next": next_obs.reshape(ENVS, 3, 3, 84, 84)}
        self.buffer.add(
            self.row(**stacks, act=action, rew=reward, terminated=no, truncated=ends, info=self.row())
        )

    def sample(self):
        batch, _ = self.buffer.sample(BATCH)
        obs, next_obs = (torch.from_numpy(x.reshape(BATCH, *SHAPE)) for x in (batch.obs, batch.obs_next))
        return obs, next_obs, torch.from_numpy(batch.rew)


class Cpprb:
    def __init__(self) -> None:
        import cpprb

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


class CpprbCompressed:
    """next_of and stack_compress follow one stream of steps and stacks along the last axis: a buffer per
    environment."""

    def __init__(self) -> None:
        import cpprb

        entries = {
            "obs": {"shape": (FRAME, 3), "dtype": np.uint8},
            "act": {"shape": 6},
            "rew": {},
            "done": {},
        }
        options = {"next_of": "obs", "stack_compress": "obs"}
        self.buffers = [cpprb.ReplayBuffer(CAPACITY // ENVS, entries, **options) for _ in range(ENVS)]
        self.nbytes = CAPACITY * (FRAME + 32)

    def add(self, obs, next_obs, reward, truncated) -> None:
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
    def __init__(self) -> None:
        from tensordict import TensorDict
        from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

        self.tensordict = TensorDict
        self.buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(CAPACITY), batch_size=BATCH)
        self.nbytes = CAPACITY * (2 * int(np.prod(SHAPE)) + 32)

    def add(self, obs, next_obs, reward, truncated) -> None:
        following = {"pixels": torch.from_numpy(next_obs), "reward": torch.from_numpy(reward)[:, None]}
        row = {"pixels": torch.from_numpy(obs), "action": torch.zeros(ENVS, 6), "next": following}
        self.buffer.extend(self.tensordict(row, batch_size=[ENVS]))

    def sample(self):
        batch = self.buffer.sample()
        return batch["pixels"], batch["next", "pixels"], batch["next", "reward"][:, 0]


PEERS = {
    "ours": Ours,
    "numpy ring": NumpyRing,
    "SB3": StableBaselines3,
    "SB3 optimize_memory_usage": StableBaselines3Optimized,
    "tianshou stack_num": Tianshou,
    "cpprb": Cpprb,
    "cpprb next_of + stack_compress": CpprbCompressed,
    "TorchRL": TorchRL,
}

# --- Random shift as others do it, to float32 in [0, 1]


def slice_crop(obs: torch.Tensor) -> torch.Tensor:
    """As usually written: to float, pad all, then slice each."""
    padded = torch.nn.functional.pad(obs.float() / 255, (PAD,) * 4, mode="replicate")
    y, x = np.random.default_rng(0).integers(0, 2 * PAD + 1, (2, len(obs)))
    return torch.stack([p[:, a : a + 84, b : b + 84] for p, a, b in zip(padded, y, x, strict=True)])


def slice_crop_bytes(obs: torch.Tensor) -> torch.Tensor:
    """The same on bytes, a quarter of the memory; one cast at the end."""
    edges = ((0, 0), (0, 0), (PAD, PAD), (PAD, PAD))
    padded, out = np.pad(obs.numpy(), edges, mode="edge"), np.empty(obs.shape, np.uint8)
    y, x = np.random.default_rng(0).integers(0, 2 * PAD + 1, (2, len(obs)))
    for i, (a, b) in enumerate(zip(y, x, strict=True)):
        out[i] = padded[i, :, a : a + 84, b : b + 84]
    return torch.from_numpy(out).float().div_(255)


def grid_sample(obs: torch.Tensor) -> torch.Tensor:
    """By bilinear resampling at integer offsets, as DrQ-v2 does it."""
    size = 84 + 2 * PAD
    padded = torch.nn.functional.pad(obs.float() / 255, (PAD,) * 4, mode="replicate")
    line = torch.linspace(-1 + 1 / size, 1 - 1 / size, size)[:84]
    base = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    shift = torch.randint(0, 2 * PAD + 1, (len(obs), 1, 1, 2)) * (2.0 / size)
    return torch.nn.functional.grid_sample(padded, base + shift, padding_mode="zeros", align_corners=False)


# --- What a contender's process does: build, say how it is called, then one timed call per request


def filled(kind) -> Any:
    buffer, episodes = kind(), Episodes()
    for t in range(CAPACITY // ENVS):
        obs, next_obs, truncated = episodes.row(t)
        buffer.add(obs, next_obs, np.arange(ENVS, dtype=np.float32) + t * ENVS, truncated)
    return buffer


def description(name: str, buffer) -> str:
    """The contender's name, memory and correctness: raises where a row other than next_obs is wrong."""
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


def sampling(name: str) -> tuple[str, Callable[[], object]]:
    buffer = filled(PEERS[name])
    return description(name, buffer), buffer.sample


def plain_copy(_: str) -> tuple[str, Callable[[], object]]:
    rng = np.random.default_rng(0)
    source = [torch.from_numpy(rng.integers(0, 256, (2, BATCH, *SHAPE), dtype=np.uint8)) for _ in range(8)]
    out, turn = torch.empty_like(source[0]), iter(range(10**9))
    return "plain copy of a batch", lambda: out.copy_(source[next(turn) % 8])


def shifted(method: str) -> tuple[str, Callable[[], object]]:
    buffer = filled(Ours if method == "ours" else NumpyRing)
    if method == "ours":
        check_shift(buffer.buffer)
        return method, buffer.sample_shifted
    names = {
        "numpy ring + slices of floats": buffer.sample_sliced,
        "numpy ring + slices of bytes": buffer.sample_sliced_bytes,
        "numpy ring + grid_sample": buffer.sample_resampled,
    }
    return method, names[method]


def check_shift(buffer: ReplayBuffer) -> None:
    batch = buffer.sample(64, augment="shift", pad=PAD)
    plain = buffer.observations(batch.index).float() / 255
    padded = torch.nn.functional.pad(plain, (PAD,) * 4, mode="replicate")
    for i, (y, x) in enumerate(batch.obs_offset.tolist()):
        assert torch.equal(batch.obs[i], padded[i, :, y : y + 84, x : x + 84])


def adding(name: str) -> tuple[str, Callable[[], object]]:
    """1000 vector steps per call: 100 different ones, ten times."""
    buffer, episodes = filled(PEERS[name]), Episodes()
    rows = [(*episodes.row(t), np.zeros(ENVS, np.float32)) for t in range(2 * LENGTH)]

    def run():
        for obs, next_obs, truncated, reward in 10 * rows:
            buffer.add(obs, next_obs, reward, truncated)

    return name, run


def threads(count: str, dtype: torch.dtype) -> tuple[str, Callable[[], object]]:
    torch.set_num_threads(1 if count == "1 thread" else 2)
    if count == "fill_ of as many bytes":
        out = [torch.empty(BATCH, *SHAPE, dtype=dtype) for _ in range(2)]
        return count, lambda: [tensor.fill_(1) for tensor in out]
    buffer = filled(Ours).buffer
    return count, lambda: buffer.sample(BATCH, augment="shift", pad=PAD, dtype=dtype)


def prioritized(name: str) -> tuple[str, Callable[[], object]]:
    """sample and update_priorities, 100 times per call."""
    size, rng = 1_000_000, np.random.default_rng(0)
    priorities = rng.random(BATCH)
    obs, zero, no = np.zeros((1000, 1), np.float32), np.zeros(1000, np.float32), np.zeros(1000, bool)
    if name == "ours":
        buffer = ReplayBuffer(
            size, num_envs=1000, obs_shape=(1,), action_shape=(), sampler="prioritized", seed=0
        )
        for _ in range(size // 1000):
            index = buffer.add(obs, zero, zero, obs, no, no)
            buffer.update_priorities(index, rng.random(1000))

        def once() -> None:
            buffer.update_priorities(buffer.sample(BATCH).index, priorities)
    elif name == "cpprb":
        import cpprb

        fields = {name: {} for name in ("obs", "act", "rew", "next_obs", "done")}
        peer = cpprb.PrioritizedReplayBuffer(size, fields)
        for _ in range(size // 1000):
            peer.add(obs=obs, act=zero, rew=zero, next_obs=obs, done=no, priorities=rng.random(1000))

        def once() -> None:
            peer.update_priorities(peer.sample(BATCH)["indexes"], priorities)
    else:
        from tensordict import TensorDict
        from torchrl.data import LazyTensorStorage, PrioritizedSampler, TensorDictReplayBuffer

        column, values = torch.zeros(size, 1), torch.from_numpy(priorities).float()
        names = ("obs", "act", "rew", "next_obs", "done")
        sampler = PrioritizedSampler(size, alpha=0.6, beta=0.4)
        torchrl = TensorDictReplayBuffer(
            storage=LazyTensorStorage(size), sampler=sampler, batch_size=BATCH, priority_key="td_error"
        )
        torchrl.extend(TensorDict(dict.fromkeys(names, column), batch_size=[size]))

        def once() -> None:
            batch = torchrl.sample()
            batch["td_error"] = values
            torchrl.update_tensordict_priority(batch)

    def run() -> None:
        for _ in range(100):
            once()

    return name, run


def serve(pipe, job: Callable[[str], tuple[str, Callable[[], object]]], name: str) -> None:
    torch.set_num_threads(1)
    try:
        label, call = job(name)
    except (ImportError, RuntimeError) as error:  # TorchRL's way of saying that its extension did not load
        pipe.send(("unavailable", " ".join(str(error).split())[:120]))
        return
    pipe.send(("ready", label))
    held = None
    while pipe.recv() == "go":
        begin = time.perf_counter()
        held = call()  # as in a training loop, the batch before lives until this one is there
        pipe.send(time.perf_counter() - begin)
    del held


# --- The races


@contextmanager
def contender(job, name: str) -> Iterator[tuple[str, Callable[[], float] | None]]:
    """(label, one timed call), or (why not, None)."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, job, name))
    process.start()
    theirs.close()

    def call() -> float:
        ours.send("go")
        return ours.recv()

    state, text = ours.recv()
    try:
        yield text, call if state == "ready" else None
    finally:
        if state == "ready":
            ours.send("stop")
        process.join()


def race(benchmark, jobs: dict[str, Any], *, rounds: int, rows: int, limit: str | None = None) -> None:
    """Times the contenders in turn; the first is ours, `limit` the one that the hardware allows.

    A row's time is that of `rows` transitions."""
    with ExitStack() as stack:
        running, unavailable = {}, {}
        for name, job in jobs.items():
            label, call = stack.enter_context(contender(job, name))
            if call is None:
                unavailable[name] = label
            else:
                running[name] = label, call
        times: dict[str, list[float]] = {name: [] for name in running}

        def one_round() -> None:
            for name, (_, call) in running.items():
                times[name].append(call())

        ours = next(iter(jobs))
        for _ in range(2):
            one_round()
        for values in times.values():
            values.clear()
        benchmark.pedantic(running[ours][1], setup=one_round, rounds=rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    labels = {name: "ours" if name == ours else label for name, (label, _) in running.items()}
    benchmark.extra_info.update(
        device="CPU, 1 thread" if "thread" not in ours else f"CPU, {ours}",
        ours=running[ours][0],
        seconds={labels[name]: value for name, value in medians.items()},
        fastest={labels[name]: min(values) for name, values in times.items()},
        transitions_per_second={labels[name]: round(rows / value) for name, value in medians.items()},
        unavailable=unavailable,
        limit=medians[limit] if limit else None,
    )


def test_sample_uint8(benchmark):
    jobs = {**dict.fromkeys(PEERS, sampling), "plain copy": plain_copy}
    race(benchmark, jobs, rounds=30, rows=BATCH, limit="plain copy")


def test_sample_float32_with_shift(benchmark):
    methods = ["slices of floats", "slices of bytes", "grid_sample"]
    jobs = dict.fromkeys(["ours", *(f"numpy ring + {method}" for method in methods)], shifted)
    race(benchmark, jobs, rounds=7, rows=BATCH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_two_threads(benchmark, dtype):
    fill = "fill_ of as many bytes"
    jobs = dict.fromkeys(["2 threads", "1 thread", fill], partial(threads, dtype=dtype))
    race(benchmark, jobs, rounds=20, rows=BATCH, limit=fill)


def test_add_1000_steps_of_8(benchmark):
    race(benchmark, dict.fromkeys(PEERS, adding), rounds=5, rows=1000 * ENVS)


def test_prioritized_1e6_entries_100_times(benchmark):
    jobs = dict.fromkeys(["ours", "cpprb", "TorchRL"], prioritized)
    race(benchmark, jobs, rounds=15, rows=100 * BATCH)


def rates(path: Path) -> str:
    """What ours is and does per row, which the table of times has no column for."""
    lines = []
    for entry in json.loads(path.read_text())["benchmarks"]:
        info, name = entry["extra_info"], entry["name"].removeprefix("test_")
        each = ", ".join(f"{who}: {rate:,}" for who, rate in info["transitions_per_second"].items())
        lines.append(f"- {name}, {info['ours']}. Transitions per second: {each}")
    return "\n".join(lines)


if __name__ == "__main__":
    from bench_ops import table

    print(table(Path(sys.argv[1])), rates(Path(sys.argv[1])), sep="\n\n")
