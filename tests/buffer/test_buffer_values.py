"""What the buffer stores is what it was given, or it says what it cannot store."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from test_buffer import window

from covr_fast import ReplayBuffer


def make(**options) -> ReplayBuffer:
    return ReplayBuffer(
        16,
        **{"num_envs": 2, "obs_shape": (3,), "action_shape": (2,), "seed": 0, "extras": {"prior": (2,)}}
        | options,
    )


def rows(buffer: ReplayBuffer, **changes) -> dict:
    """Arguments of add() for two environments: zeros, but for the `changes`."""
    key = buffer._options.keys[0]
    obs = np.zeros((2, *key.shape), key.numpy_dtype)
    no = np.zeros(2, bool)
    given = {"obs": obs, "reward": np.zeros(2), "next_obs": obs, "terminated": no, "truncated": no}
    columns = {column.name: np.zeros((2, *column.shape), np.int64) for column in buffer._options.columns}
    return given | columns | changes


def refused(buffer: ReplayBuffer, match: str, **changes) -> None:
    """With nothing half-written: neither the row, nor anything that a sample would show."""
    before = len(buffer)
    with pytest.raises(ValueError, match=match):
        buffer.add(**rows(buffer, **changes))
    assert len(buffer) == before


DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
FLOATS = [torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["obs", "next_obs", "action", "prior"])
def test_integers_fit_their_column_or_are_refused(dtype, name):
    limits = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    buffer = make(obs_dtype=dtype, action_dtype=dtype, extras={"prior": ((2,), dtype)})
    for limit, beyond in zip(limits, (-1, 1), strict=True):
        kept = np.zeros(rows(buffer)[name].shape, np.int64)
        kept[1, 0] = limit
        index = buffer.add(**rows(buffer, **{name: kept}))
        batch = buffer.get(index)
        found = batch.extras["prior"] if name == "prior" else getattr(batch, name)
        assert found[1, 0].item() == limit
        if dtype == torch.int64 and beyond < 0:
            continue
        wide = kept.astype(np.uint64 if beyond > 0 else np.int64)
        wide[1, 0] += np.array(1, wide.dtype) if beyond > 0 else np.array(-1, wide.dtype)
        dtype_name = buffer._options.keys[0].numpy_dtype
        refused(buffer, rf"{name}\[1, 0\] is {wide[1, 0]}, which {dtype_name} cannot hold", **{name: wide})
        buffer.cut()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["obs", "action", "reward", "prior"])
def test_integers_are_exact_in_a_float_column_or_refused(dtype, name):
    buffer = make(obs_dtype=dtype, action_dtype=dtype, extras={"prior": ((2,), dtype)})
    column = torch.float32 if name == "reward" else dtype
    first_lost = 2 ** {torch.float16: 11, torch.float32: 24, torch.float64: 53}[column] + 1
    given = np.zeros(rows(buffer)[name].shape, np.int64)
    given[(1, *[0] * (given.ndim - 1))] = first_lost
    refused(buffer, rf"{name}\[1.*\] is {first_lost}, which float\d+ cannot hold", **{name: given})
    for exact in (first_lost - 1, first_lost + 1, -first_lost + 1):
        given[given != 0] = exact
        index = buffer.add(**rows(buffer, **{name: given}))
        batch = buffer.get(index)
        found = batch.extras["prior"] if name == "prior" else getattr(batch, name)
        assert found.double().sum().item() == exact
        buffer.cut()


def test_the_largest_integers_do_not_wrap_on_the_way():
    buffer = make()
    for value in (2**63 - 1, -(2**63) + 1):
        refused(buffer, f"reward\\[0\\] is {value}", reward=np.array([value, 0]))
    refused(buffer, "reward", reward=np.array([2**64 - 1, 0], np.uint64))
    half = make(obs_dtype=torch.float16)
    for kind in (np.int32, np.int64):  # infinity, cast back, is the least integer
        refused(half, "obs", obs=np.full((2, 3), np.iinfo(kind).min, kind))
    buffer.add(**rows(buffer, reward=np.array([-(2**63), 2**62])))
    buffer.add(**rows(buffer, reward=np.array([2**63, 0], np.uint64)))


def test_floats_are_rounded_but_do_not_overflow():
    buffer = make(extras={"prior": ((2,), torch.float16)})
    index = buffer.add(**rows(buffer, reward=np.array([0.1, 1e-300]), prior=np.full((2, 2), 0.1)))
    batch = buffer.get(index)
    assert batch.reward.tolist() == [np.float32(0.1), 0.0]
    assert (batch.extras["prior"].numpy() == np.float16(0.1)).all()
    refused(buffer, r"reward\[1\] is 1e\+39, which float32 cannot hold", reward=np.array([0, 1e39]))
    refused(buffer, r"action\[0, 1\] is -1e\+300", action=np.array([[0, -1e300], [0, 0]]))
    refused(buffer, r"obs\[0, 0\] is 1e\+39.*obs_dtype", obs=np.full((2, 3), 1e39))
    refused(buffer, r"prior\[0, 0\] is 70000\.0.*extras\['prior'\]", prior=np.full((2, 2), 7e4))


@pytest.mark.filterwarnings("error")  # numpy's, of casts that overflow
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["obs", "next_obs", "action", "reward", "prior"])
def test_nan_is_refused_and_infinity_is_for_extras_only(name, value, dtype):
    buffer = make()
    given = rows(buffer)[name].astype(dtype)
    given[1] = value
    if name == "prior" and np.isinf(value):
        index = buffer.add(**rows(buffer, prior=given))
        assert buffer.extras(index)["prior"][1].tolist() == [value, value]
    else:
        what = "NaN" if name == "prior" else "NaN or infinite"
        refused(buffer, rf"{name} is {what} in rows \[1\]", **{name: given})


@pytest.mark.parametrize("name", ["obs", "action", "reward", "prior"])
@pytest.mark.parametrize("kind", ["complex64", "object", "str", "datetime64[s]"])
def test_what_is_no_number_is_refused(name, kind):
    buffer = make()
    refused(buffer, f"{name} has dtype", **{name: rows(buffer)[name].astype(int).astype(kind)})


@pytest.mark.parametrize("shape", [(2, 3, 2), (2, 6), (2, 2, 3, 1), (2, 1, 2, 3)])
def test_actions_and_extras_of_another_shape_are_refused(shape):
    buffer = make(action_shape=(2, 3), extras={"prior": (2, 3)})
    right = np.zeros((2, 2, 3), np.float32)
    wrong = np.zeros(shape, np.float32)
    expected = r"it must be \[rows, 2, 3\]"
    refused(buffer, f"action has shape .*{expected}", action=wrong, prior=right)
    refused(buffer, f"prior has shape .*{expected}", action=right, prior=wrong)
    index = buffer.add(**rows(buffer, action=right, prior=right))
    with pytest.raises(ValueError, match=r"prior has shape .* must be \(2, 2, 3\)"):
        buffer.set_extras(index, prior=wrong)


def test_a_column_of_one_is_not_a_number():
    """[B, 1] where [B] was declared would broadcast against [B] to [B, B] in a loss."""
    buffer = make(action_shape=(), extras={"prior": ()})
    column = np.zeros((2, 1), np.float32)
    refused(buffer, r"action has shape \[2, 1\]: it must be \[rows\]", action=column, prior=column[:, 0])
    refused(buffer, r"prior has shape \[2, 1\]", prior=column)
    buffer.add(**rows(buffer, prior=column[:, 0]))


def test_what_is_set_later_obeys_the_same_rules():
    buffer = make(extras={"prior": ((2,), torch.int8)}, sampler="prioritized")
    index = buffer.add(**rows(buffer, prior=np.ones((2, 2), int)))
    with pytest.raises(ValueError, match=r"prior\[0, 1\] is 300, which int8 cannot hold"):
        buffer.set_extras(index, prior=[[1, 300], [1, 1]])
    assert buffer.extras(index)["prior"].tolist() == [[1, 1], [1, 1]]
    for wrong in (np.nan, np.inf, -1.0):
        with pytest.raises(ValueError, match=r"priority\[1\] is -?\w+.*absolute TD errors"):
            buffer.update_priorities(index, [1.0, wrong])
    with pytest.raises(ValueError, match="priority has dtype complex128"):
        buffer.update_priorities(index, [1j, 1.0])
    with pytest.raises(ValueError, match=r"priority has shape \(1, 2\): it must be \(2,\)"):
        buffer.update_priorities(index, np.ones((1, 2)))
    buffer.update_priorities(index, np.ones((2, 1)))
    for name, correct in ("terminated", buffer.set_terminated), ("truncated", buffer.set_truncated):
        for wrong in ([0.5, np.nan], [2, 3]):
            with pytest.raises(ValueError, match=rf"{name} has dtype \w+64: it must be bool"):
                correct(index, wrong)
        with pytest.raises(ValueError, match=rf"{name} has shape \(1,\): it must be \(2,\)"):
            correct(index, [True])
    assert not buffer.get(index).terminated.any()


@pytest.mark.parametrize("call", ["get", "contains", "observations", "actions"])
def test_ids_do_not_wrap(call):
    buffer = make()
    buffer.add(**rows(buffer))
    with pytest.raises(ValueError, match=r"index\[0\] is 18446744073709551615, which int64 cannot hold"):
        getattr(buffer, call)(np.array([2**64 - 1], np.uint64))
    refused(buffer, r"env_ids\[1\] is 18446744073709551615", env_ids=np.array([0, 2**64 - 1], np.uint64))
    with pytest.raises(ValueError, match="env_ids"):
        buffer.cut(np.array([2**64 - 1], np.uint64))


@pytest.mark.parametrize("dtype", ["<f4", ">f4", ">f8", "<i8", ">i2", "?"])
def test_numbers_of_any_machine_and_width(dtype):
    buffer = make()
    obs = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    index = buffer.add(**rows(buffer, obs=obs, action=obs[:, 1:], reward=obs[:, 0]))
    batch = buffer.get(index)
    assert batch.obs.tolist() == [[0, 1, 1], [1, 0, 1]]
    assert batch.action.tolist() == [[1, 1], [0, 1]]
    assert batch.reward.tolist() == [0, 1]


class TestGreyPictures:
    """Observations [H, W] are pictures, a byte per pixel, unless another dtype is declared."""

    def buffer(self, **options) -> ReplayBuffer:
        return make(**({"obs_shape": (12, 10), "extras": None} | options))

    def add(self, buffer, obs, next_obs):
        return buffer.add(**rows(buffer, obs=obs, next_obs=next_obs))

    def frames(self, n, dtype=np.uint8):
        return np.random.default_rng(0).integers(0, 256, (n, 2, 12, 10), np.uint8).astype(dtype)

    def test_cost_a_byte_per_pixel_and_come_back(self):
        buffer, frames = self.buffer(), self.frames(5)
        assert buffer._storage.tensors["frames.obs"].dtype == torch.uint8
        index = torch.cat([self.add(buffer, *pair) for pair in pairwise(frames)])
        batch = buffer.get(index, dtype=torch.uint8)
        assert np.array_equal(batch.obs.numpy(), frames[:-1].reshape(-1, 12, 10))
        assert np.array_equal(batch.next_obs.numpy(), frames[1:].reshape(-1, 12, 10))
        assert torch.equal(buffer.get(index).obs, batch.obs / 255)
        assert np.array_equal(buffer.frames(index).numpy(), frames[:-1].reshape(-1, 12, 10))

    def test_are_augmented_as_pictures(self):
        buffer, frames = self.buffer(), self.frames(2)
        index = self.add(buffer, frames[0], frames[1])
        shifted = buffer.get(index, augment="shift", pad=2, dtype=torch.uint8)
        for got, offset, frame in zip(shifted.obs, shifted.obs_offset, frames[0], strict=True):
            assert np.array_equal(got.numpy()[None], window(frame[None], offset, "shift", 2))
        cropped = buffer.get(index, augment="crop", pad=2, dtype=torch.uint8)
        assert cropped.obs.shape == (2, 8, 6)
        for got, offset, frame in zip(cropped.next_obs, cropped.next_obs_offset, frames[1], strict=True):
            assert np.array_equal(got.numpy()[None], window(frame[None], offset, "crop", 2))
        moved = buffer.get(index, augment="translate", pad=2, dtype=torch.uint8)
        assert moved.obs.shape == (2, 16, 14)
        for got, offset, frame in zip(moved.next_obs, moved.obs_offset, frames[1], strict=True):
            assert np.array_equal(got.numpy()[None], window(frame[None], offset, "translate", 2))

    def test_survive_a_file(self, tmp_path):
        buffer, frames = self.buffer(), self.frames(2)
        self.add(buffer, frames[0], frames[1])
        buffer.save(tmp_path / "grey")
        loaded = ReplayBuffer.load(tmp_path / "grey")
        assert torch.equal(loaded.sample(4).obs, buffer.sample(4).obs)

    @pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.int16])
    def test_may_come_as_wider_integers(self, dtype):
        buffer, frames = self.buffer(), self.frames(2, dtype)
        index = self.add(buffer, frames[0], frames[1])
        assert np.array_equal(buffer.get(index, dtype=torch.uint8).obs.numpy(), frames[0])
        frames[1, 1, 3, 4] = 256
        buffer.cut()
        with pytest.raises(ValueError, match=r"next_obs\[1, 3, 4\] is 256, which .*obs_dtype"):
            self.add(buffer, frames[0], frames[1])

    def test_floats_ask_for_their_dtype(self):
        frames = self.frames(2, np.float32) / 255
        with pytest.raises(ValueError, match=r"obs has dtype float32: it must be uint8.*obs_dtype"):
            self.add(self.buffer(), frames[0], frames[1])
        buffer = self.buffer(obs_dtype=torch.float32)
        index = self.add(buffer, frames[0], frames[1])
        assert np.array_equal(buffer.get(index).obs.numpy(), frames[0])

    def test_stacked_vectors_stay_floats(self):
        assert make(obs_shape=(4, 7), frame_stack=4)._options.keys[0].dtype == torch.float32


@pytest.mark.parametrize("name", ["obs", "action", "reward", "next_obs"])
def test_bfloat16_as_autocast_gives_it(name):
    buffer = make(sampler="prioritized")
    given = torch.full(rows(buffer)[name].shape, 1.5, dtype=torch.bfloat16)
    index = buffer.add(**rows(buffer, **{name: given}))
    assert (getattr(buffer.get(index), name) == 1.5).all()
    buffer.update_priorities(index, torch.ones(2, dtype=torch.bfloat16))


def test_fractions_are_not_rounded_to_integers():
    half = np.full((2, 3), 0.5, np.float32)
    whole = make(action_dtype=torch.int64)
    refused(whole, "action has dtype float32: it must be int64", action=half[:, :2])
    refused(make(obs_dtype=torch.int64), "obs has dtype float32: it must be int64", obs=half, next_obs=half)
    buffer = make(extras={"tokens": ((), torch.int32)})
    index = buffer.add(**rows(buffer, tokens=[1, 2]))
    with pytest.raises(
        ValueError, match=r"tokens has dtype float64: it must be int32; cast it, or .* extras\['tokens'\]"
    ):
        buffer.set_extras(index, tokens=[0.5, 0.5])


def test_a_mask_is_no_list_of_ids():
    buffer, mask = make(), np.array([True, False])
    refused(buffer, r"env_ids has dtype bool.*np\.flatnonzero", env_ids=mask)
    with pytest.raises(ValueError, match="env_ids has dtype bool"):
        buffer.cut(mask)
    index = buffer.add(**rows(buffer))
    with pytest.raises(ValueError, match="index has dtype bool"):
        buffer.get(torch.from_numpy(mask))
    assert len(buffer.get(index[mask]).index) == 1
    assert len(buffer.get([]).index) == 0


def test_a_long_double_is_a_float():
    buffer = make()
    index = buffer.add(**rows(buffer, action=np.full((2, 2), 0.5, np.longdouble)))
    assert (buffer.actions(index) == 0.5).all()
    refused(buffer, "action.*NaN or infinite", action=np.full((2, 2), np.nan, np.longdouble))


def test_frames_whose_dtype_fits_are_not_scanned(monkeypatch):
    """The check of ranges would cost as much as storing them."""
    buffer = make(obs_shape=(3, 8, 8))
    frames = np.zeros((2, 3, 8, 8), np.uint8)

    class Watched(np.ndarray):
        def min(self, *args, **kwargs):
            raise AssertionError("scanned")

    watched = frames.view(Watched)
    buffer.add(**rows(buffer, obs=watched, next_obs=watched))
