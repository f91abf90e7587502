"""Drawing and rebuilding a batch on the device, against a copy there of as many bytes.

    python benchmarks/bench_gather.py FILE.json          # measures, and leaves the table in FILE.md

Stacks of three 84x84 RGB frames from 8 environments, shifted at random. The limit is the time of the bytes
that a perfect implementation moves at the copy bandwidth measured in the same run: the four frames that obs
and next_obs of a row are made of, and both of them in the dtype asked for. CUDA rows appear where there is
a device (`-m needs_cuda` runs only those).
"""

import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_buffer import ACTION, ENVS, NO, PAD, SHAPE, STACK, Episodes
from bench_ops import DEVICES, bandwidth
from race import main, on_device, race, sized, steady

from covr_fast import ReplayBuffer
from covr_fast.ops import random_shift

FRAME = STACK // 3


@cache
def filled(device: str) -> ReplayBuffer:
    """20,000 transitions, 420 MB of frames: more than a GPU's cache holds."""
    capacity, episodes = sized(20_000, 800), Episodes()
    buffer = ReplayBuffer(
        capacity, num_envs=ENVS, obs_shape=SHAPE, action_shape=(6,), frame_stack=3, seed=0, device=device
    )
    for t in range(capacity // ENVS):
        obs, next_obs, truncated = episodes.row(t)
        buffer.add(obs, ACTION, np.zeros(ENVS, np.float32), next_obs, NO, NO | truncated)
    return buffer


@pytest.mark.parametrize(
    "rows, dtype, memory_format",
    [
        (512, torch.bfloat16, torch.contiguous_format),
        (256, torch.float32, torch.channels_last),
        (256, torch.uint8, torch.contiguous_format),
    ],
    ids=["512 x bfloat16", "256 x float32 channels_last", "256 x uint8"],
)
@pytest.mark.parametrize("device", DEVICES)
def test_gather(benchmark, device, rows, dtype, memory_format):
    buffer, rows = filled(device), sized(rows, 16)
    options = {"augment": "shift", "pad": PAD, "dtype": dtype, "memory_format": memory_format}
    sample = partial(buffer.sample, rows, **options)

    batch = sample()
    plain = buffer.observations(batch.index).to(device)
    shifted = random_shift(plain, batch.obs_offset.to(device), PAD, backend="reference")
    found = batch.obs.float() / (1 if dtype.is_floating_point else 255)
    torch.testing.assert_close(found, shifted, rtol=2**-8, atol=1e-6)
    written = batch.obs.nbytes + batch.next_obs.nbytes
    moved = written + 4 * FRAME * rows
    source = torch.ones(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    functions = {"sample": sample, "copy of as many bytes": partial(target.copy_, source)}
    result = race(functions, sized(15, 1), partial(steady, device=device), benchmark=benchmark)
    if device == "cuda":
        result["on_device"] = on_device(sample, record=False)  # planned by the host
    benchmark.extra_info.update(result, items=rows, limit=moved / bandwidth(device))


if __name__ == "__main__":
    raise SystemExit(main(__file__, Path(sys.argv[1])))
