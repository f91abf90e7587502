"""An obs that is not next_obs of the step before begins a new segment; rounding is no such thing."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch

from covr_fast import ReplayBuffer
from covr_fast._C import FrameStackError


def make(**options) -> ReplayBuffer:
    return ReplayBuffer(
        256, **{"num_envs": 1, "obs_shape": (4,), "action_shape": (), "n_step": 3, "gamma": 1.0} | options
    )


def walk(buffer: ReplayBuffer, path: np.ndarray, processed=lambda obs: obs) -> torch.Tensor:
    """Adds the steps along `path` [T, ...] with reward 1; each next_obs is given again `processed`."""
    no = np.zeros(1, bool)
    return torch.cat(
        [
            buffer.add(processed(one)[None], np.zeros(1), np.ones(1), other[None], no, no)
            for one, other in pairwise(path)
        ]
    )


PATH = np.random.default_rng(0).normal(size=(30, 4))
SAME = {
    "zeros of the other sign": (PATH * (PATH > 0), lambda x: np.where(x == 0, -0.0, x)),
    "rounded to float32": (PATH, lambda x: x.astype(np.float32).astype(np.float64)),
    "normalised again": (PATH, lambda x: x + 1e-7),
    "scaled and back": (PATH * 1e6, lambda x: x / 3 * 3),
    "tiny and rounded": (PATH * 1e-12, lambda x: x.astype(np.float32)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SAME)
def test_an_obs_of_the_same_value_goes_on(name, dtype):
    path, processed = SAME[name]
    buffer = make(obs_dtype=dtype)
    index = walk(buffer, path, processed)
    assert buffer.jumps == 0
    batch = buffer.get(index[:-2])
    assert (batch.reward == 3).all()
    np.testing.assert_allclose(batch.obs.numpy(), path[:-3], rtol=2e-5, atol=2e-6 * min(1, path.max()))


def test_halves_are_compared_as_halves():
    path = PATH.astype(np.float16)
    buffer = make(obs_dtype=torch.float16)
    walk(buffer, path, lambda x: np.nextafter(x, np.float16(np.inf)))
    assert buffer.jumps == 0
    walk(buffer, path * np.float16(1.1))
    assert buffer.jumps == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("scale", "step"), [(1.0, 1e-4), (1e-12, 1e-15), (1e6, 1e3)], ids=["usual", "tiny", "large"]
)
def test_an_obs_of_another_value_begins_a_segment(scale, step, dtype):
    buffer = make(obs_dtype=dtype)
    index = walk(buffer, PATH[:5] * scale)
    moved = PATH[4:9] * scale
    moved[0, 2] += step
    walk(buffer, moved)
    assert buffer.jumps == 1
    assert buffer.get(index).reward.tolist() == [3, 3, 2, 1]


def test_a_large_element_does_not_hide_a_small_one():
    buffer = make()
    path = np.zeros((4, 4))
    path[:, 0] = 1e9
    path[:, 1] = [0.1, 0.2, 0.3, 0.4]
    walk(buffer, path)
    path[0, 1] = 0.5
    walk(buffer, path)
    assert buffer.jumps == 1


class TestStacks:
    """Of vectors and of float pictures, whose older frames are compared with what is stored."""

    def stacks(self, frames: np.ndarray, channels_last=False) -> np.ndarray:
        axis = -1 if channels_last else 1
        padded = np.concatenate([frames[:1], frames[:1], frames])
        return np.concatenate([padded[:-2], padded[1:-1], padded[2:]], axis)

    @pytest.mark.parametrize("shape", [(4,), (2, 6, 6), (2, 40, 40)], ids=str)
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_slide_when_computed_again(self, shape, channels_last):
        frames = np.random.default_rng(1).normal(size=(12, *shape)).astype(np.float32)
        last = channels_last and len(shape) == 3
        if last:
            frames = np.moveaxis(frames, 1, -1).copy()
        path = self.stacks(frames, last)
        buffer = make(
            obs_shape=path.shape[1:], obs_dtype=torch.float32, frame_stack=3, channels_last=channels_last
        )
        index = walk(buffer, path, lambda x: x * np.float32(1 + 3e-7))
        assert (buffer.get(index[:-2]).reward == 3).all()
        wrong = path[1:3].copy()
        wrong[0] += 0.1
        with pytest.raises(FrameStackError, match="obs is not next_obs of the step before"):
            walk(buffer, wrong)

    def test_bytes_stay_exact(self):
        frames = np.full((6, 1, 8, 8), 100, np.uint8)
        buffer = make(obs_shape=(3, 8, 8), frame_stack=3)
        path = self.stacks(frames)
        walk(buffer, path)
        path[0, 0, 0, 0] += 1
        with pytest.raises(FrameStackError):
            walk(buffer, path)

    def test_black_padding_has_no_sign(self):
        path = self.stacks(np.repeat([0, 1], [2, 6])[:, None] * np.ones((1, 2), np.float32))[2:]
        buffer = make(obs_shape=(6,), frame_stack=3)
        index = walk(buffer, path, lambda x: np.where(x == 0, -0.0, x))
        assert buffer.get(index[:1]).reward.tolist() == [3]


def test_frequent_jumps_are_said_once_with_the_remedy():
    buffer = make()
    with pytest.warns(UserWarning, match=r"\d+ of \d+ rows did not continue.*cut\(env_ids\)") as caught:
        walk(buffer, np.random.default_rng(0).normal(size=(200, 4)), lambda x: x + 0.5)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert buffer.jumps == 198  # the first row begins a segment anyway


@pytest.mark.parametrize("on_jump", ["cut", "error"])
def test_rare_jumps_and_announced_resets_are_no_news(on_jump):
    buffer, generator = make(on_jump=on_jump), np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            walk(buffer, generator.normal(size=(21, 4)))  # one jump in twenty rows
        assert buffer.jumps == 19
        for _ in range(60):
            buffer.cut()
            walk(buffer, generator.normal(size=(2, 4)))
    assert buffer.jumps == 19
