"""Batches made in the background equal those of sample()."""

import pickle
import threading

import numpy as np
import pytest
import torch

from covr_fast import ReplayBuffer


def filled(steps=40, **options) -> ReplayBuffer:
    buffer = ReplayBuffer(
        60, num_envs=2, obs_shape=(9, 12, 12), action_shape=(2,), frame_stack=3, seed=3, **options
    )
    add(buffer, range(steps))
    return buffer


def stack(step: int) -> np.ndarray:
    """Of two environments; every pixel of a frame is its step's number."""
    frames = [np.full((2, 3, 12, 12), max(step - age, 0) % 256, np.uint8) for age in (2, 1, 0)]
    return np.concatenate(frames, axis=1)


def add(buffer, steps) -> None:
    no = np.zeros(2, bool)
    for step in steps:
        number = np.full(2, step, np.float32)
        buffer.add(stack(step), np.zeros((2, 2)), number, stack(step + 1), no, no)


def assert_same(a, b) -> None:
    for name in ("index", "obs", "next_obs", "reward", "weight", "obs_offset"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("sampler", ["uniform", "recent", "prioritized"])
def test_the_batches_are_those_of_sample(sampler):
    plain, ahead = filled(sampler=sampler), filled(sampler=sampler)
    with ahead.prefetch(32, augment="shift", pad=2) as batches:
        for _ in range(20):
            assert_same(next(batches), plain.sample(32, augment="shift", pad=2))


def test_calls_of_sample_in_between_take_their_place():
    plain, ahead = filled(), filled()
    with ahead.prefetch(16, augment="translate") as batches:
        for i in range(12):
            got = ahead.sample(16, augment="translate") if i % 3 == 1 else next(batches)
            assert_same(got, plain.sample(16, augment="translate"))


@pytest.mark.parametrize("way", ["pickle", "save", "close"])
def test_the_batch_nobody_asked_for_counts_nowhere(way, tmp_path):
    plain, ahead = filled(), filled()
    batches = ahead.prefetch(16, augment="crop", pad=1)
    for _ in range(3):
        next(batches)
        plain.sample(16, augment="crop", pad=1)
    if way == "pickle":
        ahead = pickle.loads(pickle.dumps(ahead))
    elif way == "save":
        ahead.save(tmp_path / "buffer")
        ahead = ReplayBuffer.load(tmp_path / "buffer")
    batches.close()
    assert_same(ahead.sample(16, augment="crop", pad=1), plain.sample(16, augment="crop", pad=1))


def test_one_batch_behind_what_is_added():
    buffer = filled(steps=1)
    with buffer.prefetch(200) as batches:
        next(batches)
        batches._coming[1].result()
        add(buffer, range(1, 20))
        assert next(batches).reward.max() == 0
        assert next(batches).reward.max() == 19


def test_memory_of_two_batches_is_used_over_and_over():
    buffer = filled()
    with buffer.prefetch(1000, dtype=torch.uint8) as batches:
        addresses = set()
        for _ in range(20):
            batch = next(batches)
            addresses.add(batch.obs.data_ptr())
        kept = next(batches)
        before = kept.obs.clone()
        for _ in range(5):
            next(batches)
        assert torch.equal(kept.obs, before)
    assert len(addresses) <= 6  # obs and next_obs of the batch in use, the one made and the one to come


def test_an_error_in_the_thread_surfaces_and_passes(monkeypatch):
    buffer = filled()
    batches = buffer.prefetch(8)
    next(batches)
    batches._coming[1].result()
    draw = batches._draw
    monkeypatch.setattr(batches, "_draw", lambda _: 1 / 0)
    next(batches)  # was made before; the one after it fails
    with pytest.raises(ZeroDivisionError):
        next(batches)
    monkeypatch.setattr(batches, "_draw", draw)
    assert len(next(batches).index) == 8
    batches.close()


def test_nothing_to_sample_yet():
    buffer = filled(steps=0)
    with buffer.prefetch(8) as batches:
        with pytest.raises(IndexError, match="nothing to sample"):
            next(batches)
        add(buffer, range(3))
        assert len(next(batches).index) == 8


def test_rows_stay_whole_while_others_add_and_update():
    buffer = filled(sampler="prioritized")
    writer = threading.Thread(target=add, args=(buffer, range(40, 1500)))
    writer.start()
    with buffer.prefetch(64, dtype=torch.uint8) as batches:
        while writer.is_alive():
            batch = next(batches)
            step = (batch.reward.long() % 256)[:, None, None, None]
            assert (batch.obs[:, 6:].long() == step).all()
            assert (batch.next_obs[:, 6:].long() == (step + 1) % 256).all()
            buffer.update_priorities(batch.index, batch.reward.abs())
    writer.join()


def test_closed():
    buffer = filled()
    batches = buffer.prefetch(8)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="prefetch was closed"):
        next(batches)
    with pytest.raises(ValueError, match="batch_size is 0"):
        buffer.prefetch(0)
