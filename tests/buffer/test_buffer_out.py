"""sample(out=batch) fills a batch again, or refuses it whole."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from covr_fast import ReplayBuffer


def filled(seed=0, **options):
    buffer = ReplayBuffer(
        40,
        num_envs=2,
        obs_shape=(6, 10, 12),
        action_shape=(2,),
        frame_stack=2,
        seed=seed,
        extras={"prior": (2,)},
        **options,
    )
    rng, no = np.random.default_rng(seed), np.zeros(2, bool)
    old = rng.integers(0, 256, (2, 3, 10, 12), dtype=np.uint8)
    for _ in range(12):
        new = rng.integers(0, 256, (2, 3, 10, 12), dtype=np.uint8)
        ended = rng.random(2) < 0.2
        obs = np.concatenate([old, old], 1) if _ == 0 else obs  # noqa: F821
        after = np.concatenate([obs[:, 3:], new], 1)
        buffer.add(
            obs, rng.normal(size=(2, 2)), rng.normal(size=2), after, ended, no, prior=rng.normal(size=(2, 2))
        )
        obs = np.where(ended[:, None, None, None], np.concatenate([new, new], 1), after)
    return buffer


def parts(batch):
    for field in fields(batch):
        value = getattr(batch, field.name)
        yield from value.items() if isinstance(value, dict) else [(field.name, value)]


@pytest.mark.parametrize("augment", [None, "shift", "crop", "translate"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_same_batches_in_the_same_memory(augment, memory_format):
    options = {"augment": augment, "pad": 2, "memory_format": memory_format}
    fresh, again = filled(), filled()
    out = again.sample(5, **options)
    fresh.sample(5, **options)
    memory = {name: value.data_ptr() for name, value in parts(out) if value is not None}
    for _ in range(3):
        expected = fresh.sample(5, **options)
        assert again.sample(5, out=out, **options) is out
        for (name, a), (_, b) in zip(parts(expected), parts(out), strict=True):
            assert (a is None and b is None) or torch.equal(a, b), name
    assert memory == {name: value.data_ptr() for name, value in parts(out) if value is not None}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"obs": torch.zeros(5, 6, 10, 11)}, r"out.obs is float32\[5, 6, 10, 11\] on cpu"),
        (
            {"next_obs": torch.zeros(5, 6, 10, 12, dtype=torch.uint8)},
            r"out.next_obs is uint8\[5, 6, 10, 12\]",
        ),
        (
            {"obs": torch.zeros(5, 10, 12, 6).permute(0, 3, 1, 2)},
            r"strides \[720, 1, 72, 6\]: it must be float32",
        ),
        ({"reward": torch.zeros(5, dtype=torch.float64)}, r"out.reward is float64\[5\]"),
        ({"discount": torch.zeros(10)[::2]}, r"out.discount is float32\[5\] on cpu with strides \[2\]"),
        ({"weight": np.zeros(5, np.float32)}, "out.weight is a ndarray"),
        ({"terminated": torch.zeros(5, dtype=torch.bool, device="meta")}, "out.terminated is bool.* on meta"),
        ({"extras": {}}, r"out.extras\['prior'\] is missing"),
        (
            {"obs_offset": torch.zeros(5, 2, dtype=torch.int64)},
            "out.obs_offset is int64.* it must be missing",
        ),
    ],
)
def test_another_form_is_refused_and_left_as_it_was(change, message):
    buffer, other = filled(), filled()
    out = replace(buffer.sample(5), **change)
    before = {name: value.clone() for name, value in parts(out) if isinstance(value, torch.Tensor)}
    with pytest.raises(ValueError, match=message):
        buffer.sample(5, out=out)
    assert all(torch.equal(before[n], v) for n, v in parts(out) if n in before and not v.is_meta)
    other.sample(5)
    assert torch.equal(buffer.sample(5).index, other.sample(5).index)  # it did not count


def test_what_is_no_batch_is_refused():
    buffer = filled()
    with pytest.raises(TypeError, match="out is a dict: it must be a batch that sample"):
        buffer.sample(5, out={"obs": torch.zeros(5, 6, 10, 12)})


def test_another_size_is_refused():
    buffer = filled()
    with pytest.raises(ValueError, match=r"out.obs is float32\[5, 6, 10, 12\].*it must be float32\[4, 6"):
        buffer.sample(4, out=buffer.sample(5))
