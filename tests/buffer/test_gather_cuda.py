"""The GPU's gather in every layout, on frames of even and odd sizes: equal to the CPU's, bit for bit."""

import numpy as np
import pytest
import torch
from test_buffer import make

from covr_fast import ReplayBuffer

FRAMES = {
    "whole words": ((3, 16, 12), 3),
    "crops of 8": ((1, 12, 24), 4),
    "odd": ((3, 13, 11), 3),
    "one frame, two channels": ((2, 7, 8), 1),
    "one plane": ((1, 9, 12), 1),
    "many planes": ((5, 8, 8), 5),
    "more than one block": ((3, 68, 84), 2),
}
AUGMENTATIONS = [
    (None, 0),
    ("shift", 2),
    ("crop", 2),
    ("crop", 1),
    ("translate", 2),
    ("translate", 3),
    ("translate", 10),
]
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.needs_cuda
@pytest.mark.parametrize("memory_format", FORMATS, ids=["planes", "channels last"])
@pytest.mark.parametrize("frame, stack", FRAMES.values(), ids=FRAMES.keys())
def test_images(frame, stack, memory_format):
    options = {"frame": frame, "stack": stack, "n_step": 2, "padding": "zero", "steps": 25}
    on_cpu, on_gpu = make(**options), make(**options, device="cuda")
    for augment, pad in AUGMENTATIONS:
        for dtype in (torch.uint8, torch.float32, torch.bfloat16, torch.float16):
            asked = {"augment": augment, "pad": pad, "dtype": dtype, "memory_format": memory_format}
            a, b = on_cpu.buffer.sample(7, **asked), on_gpu.buffer.sample(7, **asked)
            assert b.obs.is_contiguous(memory_format=memory_format)
            assert torch.equal(a.obs, b.obs.cpu())
            assert torch.equal(a.next_obs, b.next_obs.cpu())


@pytest.mark.needs_cuda
@pytest.mark.parametrize("memory_format", FORMATS, ids=["planes", "channels last"])
@pytest.mark.parametrize("shape", [(4, 6, 5), (4,), (24,), (6, 3), ()], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.int8, torch.bool], ids=str
)
def test_observations_of_other_types_are_copied(shape, dtype, memory_format):
    stack = 2 if shape else 1
    rng = np.random.default_rng(0)
    options = {
        "num_envs": 2,
        "obs_shape": shape,
        "obs_dtype": dtype,
        "action_shape": (1,),
        "frame_stack": stack,
    }
    buffers = [ReplayBuffer(20, **options, seed=0, device=device) for device in ("cpu", "cuda")]
    frames = torch.from_numpy(rng.integers(0, 100, (12, 2, *shape))).to(dtype).numpy()
    if stack == 2:
        frames[1:, :, : shape[0] // 2] = frames[:-1, :, shape[0] // 2 :]
        frames[0, :, : shape[0] // 2] = frames[0, :, shape[0] // 2 :]
    zeros = np.zeros(2)
    for t in range(11):
        for buffer in buffers:
            buffer.add(frames[t], zeros[:, None], zeros, frames[t + 1], zeros > 0, zeros > 0)
    a, b = (buffer.sample(9, memory_format=memory_format) for buffer in buffers)
    assert torch.equal(a.obs, b.obs.cpu())
    assert torch.equal(a.next_obs, b.next_obs.cpu())


@pytest.mark.needs_cuda
def test_what_a_block_cannot_interleave_is_an_error():
    buffer = ReplayBuffer(
        4, num_envs=1, obs_shape=(1536, 2, 2), action_shape=(1,), device="cuda", frame_stack=1
    )
    obs = np.zeros((1, 1536, 2, 2), np.uint8)
    buffer.add(obs, [[0.0]], [0.0], obs, [False], [False])
    assert buffer.sample(2).obs.shape == (2, 1536, 2, 2)
    with pytest.raises(ValueError, match="number of channels of an image is 1536"):
        buffer.sample(2, memory_format=torch.channels_last)
