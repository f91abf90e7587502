"""A GPU's buffer, whose bookkeeping is mirrored on the device: the same calls give the rows of the CPU's."""

import gc
import weakref
from contextlib import nullcontext
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from covr_fast import ReplayBuffer
from covr_fast.buffer import Prioritized, Recent

pytestmark = pytest.mark.needs_cuda

SAMPLERS = {"uniform": "uniform", "recent": Recent(eta=0.9, floor=3), "prioritized": Prioritized(beta=0.7)}


class Pair:
    """The same buffer on the CPU and on a GPU, fed alike."""

    def __init__(self, num_envs=3, capacity=61, **options):
        options = {
            "sampler": "uniform",
            "n_step": 3,
            "extras": {"prior": (2,), "big": ((5,), torch.int16)},
        } | options
        shape = {"image": (6, 8, 10), "vector": (4,)}
        self.on_cpu, self.on_gpu = (
            ReplayBuffer(
                capacity,
                num_envs=num_envs,
                obs_shape=shape,
                action_shape=(2,),
                frame_stack=2,
                seed=5,
                device=device,
                **options,
            )
            for device in ("cpu", "cuda")
        )
        self.num_envs = num_envs
        self.rng = np.random.default_rng(0)
        self.obs = self._frames(num_envs)

    def _frames(self, n):
        image = self.rng.integers(0, 256, (n, 3, 8, 10), dtype=np.uint8)
        return {
            "image": np.concatenate([image, image], 1),
            "vector": self.rng.normal(size=(n, 4)).astype(np.float32),
        }

    def add(self, steps=1):
        for _ in range(steps):
            n = self.num_envs
            fresh = self._frames(n)
            after = {
                "image": np.concatenate([self.obs["image"][:, 3:], fresh["image"][:, :3]], 1),
                "vector": fresh["vector"],
            }
            terminated, truncated = self.rng.random((2, n)) < 0.1
            rows = {
                "obs": self.obs,
                "action": self.rng.normal(size=(n, 2)),
                "reward": self.rng.normal(size=n),
                "next_obs": after,
                "terminated": terminated,
                "truncated": truncated,
                "prior": self.rng.normal(size=(n, 2)),
                "big": self.rng.integers(-99, 99, (n, 5)),
            }
            ids = [buffer.add(**rows) for buffer in self]
            assert torch.equal(*ids)
            ended = terminated | truncated
            self.obs = {
                name: np.where(ended.reshape(n, *[1] * (x.ndim - 1)), fresh[name], x)
                for name, x in after.items()
            }

    def __iter__(self):
        return iter((self.on_cpu, self.on_gpu))

    def same(self, method, *arguments, exact_weights=False, **options):
        """Calls both, and compares the batches."""
        ours, theirs = (getattr(buffer, method)(*arguments, **options) for buffer in self)
        assert_same(ours, theirs, exact_weights)
        return ours, theirs


def assert_same(on_cpu, on_gpu, exact_weights=False):
    for field in fields(on_cpu):
        a, b = getattr(on_cpu, field.name), getattr(on_gpu, field.name)
        if a is None:
            assert b is None
            continue
        for one, other in zip(a.values(), b.values(), strict=True) if isinstance(a, dict) else [(a, b)]:
            assert other.is_cuda, field.name
            if field.name == "weight" and not exact_weights:
                assert_close(other.cpu(), one)
            else:
                assert torch.equal(one, other.cpu()), field.name


@pytest.mark.parametrize("augment", [None, "shift", "translate"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_batches_are_those_of_the_cpu(sampler, augment):
    pair = Pair(sampler=SAMPLERS[sampler])
    for step in range(40):
        pair.add()
        if not pair.on_cpu._core.samplable():
            for buffer in pair:
                with pytest.raises(IndexError, match="nothing to sample"):
                    buffer.sample(4)
            continue
        ours, theirs = pair.same("sample", 7, augment=augment, pad=2, exact_weights=sampler != "prioritized")
        if sampler == "prioritized":
            priority = torch.from_numpy(pair.rng.random(7).astype(np.float32))
            pair.on_cpu.update_priorities(ours.index, priority)
            pair.on_gpu.update_priorities(theirs.index, priority.cuda() if step % 2 else priority)
            for buffer in pair:
                buffer.beta = min(1.0, buffer.beta + 0.01)
        if step % 5 == 0:
            pair.same("get", ours.index, n_step=2, exact_weights=True)


@pytest.mark.parametrize("num_envs", [1, 513, 1300])
def test_any_number_of_streams_is_drawn_from(num_envs):
    pair = Pair(num_envs, capacity=num_envs * 4, n_step=1)
    pair.add(2)
    for buffer in pair:
        buffer.cut()
    pair.add(4)
    pair.same("sample", 600)


def test_corrections_reach_the_device():
    pair = Pair(sampler="prioritized")
    pair.add(12)
    index = pair.on_cpu.sample(5).index
    for buffer in pair:
        if buffer.device.type == "cuda":
            buffer.sample(5)
        buffer.set_extras(index, prior=np.full((5, 2), 0.25))
        buffer.set_terminated(index[:2], [True, True])
        buffer.set_truncated(index[2:3], [True])
        buffer.cut([1])
    pair.same("get", index)
    pair.same("sample", 30)
    pair.add(3)
    pair.same("sample", 30)


def test_single_transitions_and_saving(tmp_path):
    pair = Pair(sampler="prioritized")
    pair.add(30)
    ours, theirs = pair.same("sample", 9)
    priority = torch.rand(9)
    pair.on_cpu.update_priorities(ours.index, priority)
    pair.on_gpu.update_priorities(theirs.index, priority.cuda())
    for name, value in pair.on_cpu.observations(ours.index).items():
        assert torch.equal(value, pair.on_gpu.observations(theirs.index)[name].cpu())
        assert torch.equal(pair.on_cpu.frames(ours.index)[name], pair.on_gpu.frames(theirs.index)[name].cpu())
    assert torch.equal(pair.on_cpu.actions(ours.index), pair.on_gpu.actions(theirs.index))
    pair.on_gpu.save(tmp_path / "buffer")
    for device in "cpu", "cuda":
        again = ReplayBuffer.load(tmp_path / "buffer", device=device)
        expected, got = pair.on_cpu.get(ours.index), again.get(ours.index)
        assert torch.equal(expected.reward, got.reward.cpu())
    again.get(ours.index)  # counts as a batch, as that of the other one did
    pair.on_gpu = again
    pair.same("sample", 12)
    pair.on_gpu.load_state_dict(pair.on_cpu.state_dict())
    pair.same("sample", 12)


def test_priorities_of_transitions_that_are_gone_or_wrong_are_skipped():
    pair = Pair(sampler="prioritized")
    pair.add(10)
    ours, theirs = pair.same("sample", 6)
    pair.add(40)  # overwrites all of them
    for batch, buffer in (ours, pair.on_cpu), (theirs, pair.on_gpu):
        buffer.update_priorities(batch.index, torch.full_like(batch.reward, 100.0))
    ours, theirs = pair.same("sample", 6)
    wrong = torch.tensor([-1.0, torch.nan, torch.inf, 1.0, 2.0, 3.0])
    pair.on_gpu.update_priorities(theirs.index, wrong.cuda())  # nobody waits for the values
    pair.on_cpu.update_priorities(ours.index[3:], wrong[3:])
    pair.same("sample", 20)
    with pytest.raises(ValueError, match=r"priority\[0\] is -1.0: priority must be finite and not negative"):
        pair.on_gpu.update_priorities(theirs.index, wrong)
    with pytest.raises(ValueError, match="priority has 2 values for 6"):
        pair.on_gpu.update_priorities(theirs.index, wrong[3:5].cuda())
    with pytest.raises(ValueError, match=r"index has dtype torch\.int32"):
        pair.on_gpu.update_priorities(theirs.index.int(), wrong.cuda())


def test_a_batch_is_filled_again_without_new_memory():
    pair = Pair()
    pair.add(20)
    out = pair.on_gpu.sample(8, augment="shift")
    pair.on_cpu.sample(8)
    memory = {field.name: getattr(out, field.name) for field in fields(out)}
    for _ in range(3):
        expected = pair.on_cpu.sample(8, augment="shift")
        assert pair.on_gpu.sample(8, augment="shift", out=out) is out
        assert_same(expected, out)
    assert all(getattr(out, name) is value for name, value in memory.items())


def test_transitions_that_are_not_stored_are_errors_on_the_host():
    pair = Pair()
    pair.add(5)
    for method in "get", "observations", "frames":
        with pytest.raises(IndexError, match="not in the buffer"):
            getattr(pair.on_gpu, method)(torch.tensor([10**6], device="cuda"))
    with pytest.raises(ValueError, match="read-only"):
        pair.on_gpu.ring("reward")[0] = 1.0


def test_a_sampling_without_a_graph_draws_the_same_sequence():
    pair = Pair(sampler="prioritized")
    pair.add(30)
    a, b = (buffer.sampling(6, augment="shift") for buffer in pair)
    for step in range(6):
        if step % 2:
            pair.same("sample", 6, augment="shift")
            continue
        for source in a, b:
            with source.turn():
                source.launch()
                source.launch_priorities(torch.linspace(0.1, 1, 6).to(source.device))
        assert_same(a.batch, b.batch)


def test_memory_is_freed_without_the_garbage_collector():
    """Or the next large buffer finds no room."""
    pair = Pair(sampler="prioritized")
    pair.add(8)
    source = pair.on_gpu.sampling(4)
    with source.turn():
        source.launch()
    pair.on_gpu.sample(4, out=pair.on_gpu.sample(4))
    ring = weakref.ref(pair.on_gpu._storage.tensors["frames.image"])
    gc.disable()
    try:
        del source, pair
        assert ring() is None
    finally:
        gc.enable()


def test_a_block_that_raises_may_have_queued_work(monkeypatch):
    """What is added next waits for it all the same."""
    pair = Pair()
    pair.add(8)
    gather, marked = pair.on_gpu._gather, []
    monkeypatch.setattr(gather, "_used", SimpleNamespace(record=marked.append))
    monkeypatch.setattr(gather, "start_reading", lambda: None)
    with pytest.raises(KeyError), gather.reading():
        raise KeyError
    assert len(marked) == 1


def test_memory_that_torch_keeps_of_an_earlier_buffer_is_free(monkeypatch):
    options = {"num_envs": 2, "obs_shape": (3, 64, 64), "action_shape": (1,), "device": "cuda"}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 << 20)
    for kept, enough in ((2 << 20, False), (5 << 20, True)):  # of 3.5 MiB
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, kept=kept: kept)
        with (
            nullcontext() if enough else pytest.raises(MemoryError, match=r"cuda:0 has 2\.0 MiB of 80\.0 GiB")
        ):
            ReplayBuffer(250, **options)
