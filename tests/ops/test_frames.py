import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from covr_fast.ops import random_crop, random_shift

SHAPES = [((5, 9, 84, 84), 4), ((3, 3, 17, 33), 6), ((2, 1, 3, 2), 5), ((4, 1, 1, 1), 0)]
FORMATS = [torch.float32, torch.bfloat16, torch.float16, torch.uint8]


def batch(shape: tuple[int, ...], pad: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return frames, torch.randint(0, 2 * pad + 1, (shape[0], 2), generator=generator)


def padded_slices(frames: torch.Tensor, offsets: torch.Tensor, pad: int) -> torch.Tensor:
    """The definition: pad by the edge, cut the window out."""
    height, width = frames.shape[-2:]
    padded = F.pad(frames.float(), [pad] * 4, mode="replicate")
    corners = zip(padded, offsets.tolist(), strict=True)
    return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in corners])


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape, pad", SHAPES)
def test_against_pad_and_slice(shape, pad, dtype, backend):
    frames, offsets = batch(shape, pad)
    expected = padded_slices(frames, offsets, pad)
    expected = expected.to(torch.uint8) if dtype == torch.uint8 else (expected / 255).to(dtype)
    result = random_shift(frames, offsets, pad, dtype=dtype, backend=backend)
    assert result.dtype == dtype
    assert result.is_contiguous()
    assert torch.equal(result, expected)


@given(
    height=st.integers(1, 12), width=st.integers(1, 40), pad=st.integers(0, 15), seed=st.integers(0, 2**20)
)
def test_any_shape(backend, height, width, pad, seed):
    frames, offsets = batch((2, 2, height, width), pad, seed)
    result = random_shift(frames, offsets, pad, dtype=torch.uint8, backend=backend)
    assert torch.equal(result.float(), padded_slices(frames, offsets, pad))


@pytest.mark.parametrize("dtype", FORMATS[:3])
def test_every_pixel_value_rounds_as_torch_does(dtype):
    frames = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 4, 64)
    result = random_shift(frames, torch.zeros(1, 2, dtype=torch.int64), 0, dtype=dtype)
    assert torch.equal(result, (frames.float() / 255).to(dtype))


def test_equals_the_grid_sample_shift_of_drq():
    """DrQ-v2 samples bilinearly at integer offsets: the same pixels up to 4e-3 on a 0-255 scale."""
    frames, offsets = batch((4, 9, 84, 84), 4)
    height, pad = 84, 4
    padded = F.pad(frames.float(), [pad] * 4, mode="replicate")
    size = height + 2 * pad
    line = torch.linspace(-1 + 1 / size, 1 - 1 / size, size)[:height]
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    grid = grid[None] + (offsets.flip(1).float() * 2 / size)[:, None, None]
    expected = F.grid_sample(padded, grid, padding_mode="zeros", align_corners=False)
    assert (random_shift(frames, offsets, pad) * 255 - expected).abs().max() < 1e-2


def test_crop(backend):
    frames, _ = batch((3, 4, 100, 90), 0)
    offsets = torch.tensor([[0, 0], [16, 6], [7, 3]])
    result = random_crop(frames, offsets, 84, backend=backend)
    expected = torch.stack(
        [image[:, y : y + 84, x : x + 84] for image, (y, x) in zip(frames, offsets.tolist(), strict=True)]
    )
    assert torch.equal(result, expected.float() / 255)


def test_non_contiguous_frames():
    frames, offsets = batch((3, 8, 8, 3), 2)
    channels_last = frames.permute(0, 3, 1, 2)
    expected = random_shift(channels_last.contiguous(), offsets, 2)
    assert torch.equal(random_shift(channels_last, offsets, 2, backend="cpp"), expected)


def test_empty_batch():
    frames, offsets = torch.empty(0, 3, 8, 8, dtype=torch.uint8), torch.empty(0, 2, dtype=torch.int64)
    assert random_shift(frames, offsets).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("bad", [-1, 9])
@pytest.mark.parametrize("axis", [0, 1])
def test_offset_out_of_range_is_an_error(bad, axis):
    frames, offsets = batch((2, 1, 8, 8), 4)
    offsets[1, axis] = bad
    with pytest.raises(ValueError, match="offsets must be in"):
        random_shift(frames, offsets, 4)


def test_out_of_range_under_compile_stays_inside_the_image():
    """A traced graph cannot look at the values, as a CUDA device does not: the nearest edge is read."""
    frames, _ = batch((1, 1, 8, 8), 4)
    far = torch.tensor([[10**12, -(10**12)]])
    result = torch.ops.covr_fast.window(frames, far, 4, 8, 8, torch.uint8)
    assert (result == frames[0, 0, 7, 0]).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"frames": torch.zeros(2, 1, 8, 8)}, "frames must be uint8"),
        ({"frames": torch.zeros(1, 8, 8, dtype=torch.uint8)}, "frames must be uint8"),
        ({"offsets": torch.zeros(2, 2)}, "offsets must be int64"),
        ({"offsets": torch.zeros(3, 2, dtype=torch.int64)}, "offsets must be int64"),
        ({"dtype": torch.float64}, "dtype must be"),
        ({"pad": -1}, "pad must not be negative"),
    ],
)
def test_errors_name_the_argument(change, message):
    frames, offsets = batch((2, 1, 8, 8), 4)
    with pytest.raises(ValueError, match=message):
        random_shift(**{"frames": frames, "offsets": offsets, **change})


def test_crop_larger_than_the_image_is_an_error():
    frames, offsets = batch((2, 1, 8, 8), 0)
    with pytest.raises(ValueError, match=r"size must be in \[1, 8\]"):
        random_crop(frames, offsets, 9)


def test_operator_checks_and_compiles():
    frames, offsets = batch((2, 3, 8, 8), 2)
    torch.library.opcheck(torch.ops.covr_fast.window.default, (frames, offsets, 2, 8, 8, torch.bfloat16))
    for window in (lambda f, o: random_shift(f, o, 2) + 1, lambda f, o: random_crop(f, o, 4) + 1):
        compiled = torch.compile(window, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(frames, offsets), window(frames, offsets))


@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape, pad", [*SHAPES, ((0, 3, 8, 8), 4)])
def test_cuda(shape, pad, dtype):
    frames, offsets = batch(shape, pad)
    result = random_shift(frames.cuda(), offsets.cuda(), pad, dtype=dtype, backend="cuda")
    assert torch.equal(result.cpu(), random_shift(frames, offsets, pad, dtype=dtype))


@pytest.mark.needs_cuda
def test_cuda_offsets_out_of_range_stay_inside_the_image():
    frames, _ = batch((1, 1, 8, 8), 4)
    far = torch.tensor([[10**12, -(10**12)]], device="cuda")
    result = random_shift(frames.cuda(), far, 4, dtype=torch.uint8, backend="cuda")
    assert (result.cpu() == frames[0, 0, 7, 0]).all()
