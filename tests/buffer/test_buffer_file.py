"""Saving, loading and pickling a buffer."""

import copy
import json
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from test_buffer import Driver, make

from covr_fast import ReplayBuffer
from covr_fast.buffer import Prioritized
from covr_fast.buffer import file as io

FEW, WRAPPED = 7, 100


def assert_continues_alike(a: Driver, buffer: ReplayBuffer) -> None:
    """Same batches now, and after the same further steps."""
    b = Driver(buffer, copy.deepcopy(a.envs))
    b.rng, b.oracle = copy.deepcopy(a.rng), copy.deepcopy(a.oracle)
    for _ in range(3):
        for _ in range(5):
            assert torch.equal(a.add(), b.add())
        x, y = a.buffer.sample(64, augment="shift"), buffer.sample(64, augment="shift")
        a.check_batch(a.buffer.sample(32, dtype=torch.uint8))
        buffer.sample(32)
        for field in ("obs", "next_obs", "action", "reward", "discount", "index", "weight", "obs_offset"):
            assert torch.equal(getattr(x, field), getattr(y, field)), field
        assert torch.equal(x.extras["prior"], y.extras["prior"])


@pytest.mark.parametrize("steps", [0, FEW, WRAPPED])
@pytest.mark.parametrize(
    "options", [{}, {"n_step": 3, "sampler": Prioritized(alpha=0.8)}, {"sampler": "recent"}]
)
@pytest.mark.parametrize("way", ["save", "pickle", "state_dict", "from_state_dict"])
def test_a_restored_buffer_continues_identically(tmp_path, steps, options, way):
    driver = make(**options, steps=steps)
    if steps and "sampler" in options:
        index = driver.buffer.sample(5).index
        if driver.buffer.beta:
            driver.buffer.update_priorities(index, torch.rand(5))
    if way == "save":
        driver.buffer.save(tmp_path / "buffer")
        restored = ReplayBuffer.load(tmp_path / "buffer")
        assert [path.name for path in tmp_path.iterdir()] == ["buffer"]
    elif way == "pickle":
        restored = pickle.loads(pickle.dumps(driver.buffer))
    elif way == "from_state_dict":
        restored = ReplayBuffer.from_state_dict(copy.deepcopy(driver.buffer.state_dict()))
    else:
        restored = make(**options, seed=9).buffer
        restored.load_state_dict(driver.buffer.state_dict())
    assert len(restored) == len(driver.buffer)
    assert_continues_alike(driver, restored)


def test_other_shapes_survive(tmp_path):
    buffer = ReplayBuffer(
        20,
        num_envs=2,
        obs_shape={"camera": (8, 6, 3), "pose": (4,)},
        frame_stack={"camera": 3},
        obs_dtype={"pose": torch.float64},
        channels_last=True,
        action_shape=(),
        action_dtype=torch.int64,
        extras={"tokens": ((3,), torch.int16), "mask": ()},
        seed=1,
    )
    buffer.save(tmp_path / "b")
    again = ReplayBuffer.load(tmp_path / "b")
    assert again.state_dict()["config"] == buffer.state_dict()["config"]
    assert again.nbytes == buffer.nbytes


def test_files_are_small_while_the_ring_is_empty(tmp_path):
    driver = make(capacity=3000, frame=(3, 16, 16), steps=5)
    driver.buffer.save(tmp_path / "b")
    assert (tmp_path / "b").stat().st_size < 0.1 * driver.buffer.nbytes


class TestDamage:
    @pytest.fixture
    def path(self, tmp_path):
        driver = make(steps=FEW)
        driver.buffer.save(tmp_path / "b")
        return tmp_path / "b"

    def test_one_flipped_bit_anywhere(self, path):
        original = path.read_bytes()
        for position in np.random.default_rng(0).integers(0, len(original), 60):
            data = bytearray(original)
            data[position] ^= 4
            path.write_bytes(data)
            with pytest.raises(ValueError, match=r"damaged|not a saved replay buffer"):
                ReplayBuffer.load(path)

    def test_cut_short(self, path):
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match="damaged"):
            ReplayBuffer.load(path)

    def test_something_else(self, path):
        path.write_bytes(b"PK\x03\x04" * 100)
        with pytest.raises(ValueError, match="not a saved replay buffer"):
            ReplayBuffer.load(path)

    def test_another_version(self, path):
        data = path.read_bytes()
        magic, length, _ = struct.unpack("<8sQI", data[:20])
        header = json.dumps(json.loads(data[20 : 20 + length]) | {"version": 0}).encode()
        path.write_bytes(
            struct.pack("<8sQI", magic, len(header), zlib.crc32(header)) + header + data[20 + length :]
        )
        with pytest.raises(ValueError, match="format version 0, this release reads version 1"):
            ReplayBuffer.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    driver = make()
    driver.add()
    driver.buffer.save(tmp_path / "b")
    before = (tmp_path / "b").read_bytes()
    driver.add()

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(io.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        driver.buffer.save(tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_states_of_other_buffers_are_refused():
    with pytest.raises(ValueError, match=r"other values of \['capacity'\]"):
        make(capacity=60).buffer.load_state_dict(make().buffer.state_dict())
