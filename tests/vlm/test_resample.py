"""Pillow's resampling in torch, against Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import random_frames

from covr_fast.vlm.model.resample import BICUBIC, LANCZOS, resize


def pillow(frames: torch.Tensor, sizes, filter_: int) -> torch.Tensor:
    """`resize`, one frame at a time."""
    images = [Image.fromarray(frame) for frame in frames.permute(0, 2, 3, 1).numpy()]
    for height, width in sizes:
        images = [image.resize((width, height), filter_) for image in images]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def adversarial(height: int, width: int) -> torch.Tensor:
    """uint8[5, 3, H, W]: noise, noise of extremes, a checkerboard, stripes, and one colour per channel."""
    noise = random_frames((height, width), 2)
    noise[1] = (noise[1] > 127) * 255
    row, column = torch.arange(height)[:, None], torch.arange(width)
    board, stripes = (row + column) % 2 * 255, (row + 0 * column) % 2 * 255
    flat = torch.tensor([0, 255, 127])[:, None, None].expand(3, height, width)
    return torch.cat((noise, torch.stack([board.expand(3, -1, -1), stripes.expand(3, -1, -1), flat]).byte()))


@pytest.mark.parametrize("filter_", [BICUBIC, LANCZOS])
@pytest.mark.parametrize(
    ("old", "sizes"),
    [
        ((84, 84), [(224, 224)]),
        ((84, 84), [(512, 512), (128, 128)]),  # halves by symmetry, on which the rounding decides
        ((60, 84), [(366, 512), (128, 128)]),
        ((84, 60), [(512, 366), (128, 128)]),
        ((96, 96), [(84, 84)]),
        ((200, 120), [(37, 110)]),  # since version 13 Pillow resizes the height first
        ((37, 110), [(200, 12)]),
        ((64, 64), [(64, 100)]),
        ((64, 64), [(20, 64)]),
        ((1, 1), [(8, 8)]),
        ((5, 7), [(1, 1)]),
    ],
)
def test_bytes_are_pillows(old, sizes, filter_):
    frames = adversarial(*old)
    assert torch.equal(resize(frames, sizes, filter_), pillow(frames, sizes, filter_))


def test_bytes_are_pillows_for_random_sizes():
    rng = np.random.default_rng(0)
    for _ in range(100):
        old, *sizes = (tuple(int(side) for side in rng.integers(1, 90, 2)) for _ in range(3))
        frames, filter_ = random_frames(old, 1), int(rng.choice([BICUBIC, LANCZOS]))
        assert torch.equal(resize(frames, sizes, filter_), pillow(frames, sizes, filter_)), (old, sizes)


def test_a_size_that_is_there_costs_nothing():
    frames = random_frames((84, 60), 2)
    assert resize(frames, [(84, 60)], BICUBIC) is frames
