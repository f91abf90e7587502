"""Constructors take numbers as numpy and torch give them, and say at once what is none."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from test_buffer_values import rows

from covr_fast import ReplayBuffer
from covr_fast.buffer import FineTuneView, Prioritized, Recent

PLAIN = {"capacity": 32, "num_envs": 2, "obs_shape": (6, 8, 8), "action_shape": (2,), "frame_stack": 3}


def make(**options) -> ReplayBuffer:
    options = PLAIN | options
    return ReplayBuffer(options.pop("capacity"), **options)


def drive(buffer: ReplayBuffer) -> ReplayBuffer:
    for _ in range(6):
        buffer.add(**rows(buffer, reward=np.ones(2)))
    return buffer


NUMPYS = [
    {"capacity": np.int64(32)},
    {"capacity": np.array(32)},
    {"capacity": torch.tensor(32)},
    {"num_envs": np.uint8(2)},
    {"n_step": np.int32(3)},
    {"frame_stack": np.int64(3)},
    {"gamma": np.float32(0.99)},
    {"gamma": np.float64(0.5)},
    {"gamma": 1},
    {"seed": np.int64(7)},
    {"obs_shape": np.array([6, 8, 8])},
    {"obs_shape": torch.Size([6, 8, 8])},
    {"obs_shape": [np.int16(6), 8, np.int64(8)]},
    {"obs_shape": {"obs": np.array([6, 8, 8])}, "frame_stack": {"obs": np.int8(2)}},
    {"obs_shape": {"obs": [6, 8, 8]}, "channels_last": {"obs": np.False_}},
    {"action_shape": torch.Size([2])},
    {"action_shape": [np.int64(2)]},
    {"extras": {"prior": [np.int64(2)], "mask": torch.Size([]), "step": ([np.int64(1)], torch.int64)}},
    {"sampler": Recent(eta=np.float32(0.99), floor=np.int64(4))},
    {"sampler": Prioritized(alpha=np.float32(0.5), beta=np.float16(0.25))},
]


@pytest.mark.parametrize("options", NUMPYS, ids=lambda options: "-".join(map(str, options.items())))
@pytest.mark.parametrize("as_text", [True, False], ids=["str", "Path"])
def test_what_numpy_and_torch_give_can_be_saved(options, as_text, tmp_path):
    buffer = make(**options)
    if not isinstance(options.get("obs_shape"), dict):
        drive(buffer)
    path = tmp_path / "buffer"
    buffer.save(str(path) if as_text else path)
    loaded = ReplayBuffer.load(str(path) if as_text else path)
    assert loaded._options == buffer._options
    assert loaded.gamma == float(options.get("gamma", 0.99))
    assert type(buffer.gamma) is float
    assert {type(n) for n in (buffer.capacity, buffer.num_envs, buffer.n_step, buffer.seed)} == {int}
    if len(buffer):
        assert torch.equal(loaded.sample(4).index, buffer.sample(4).index)


@pytest.mark.parametrize(
    "wrong", [True, np.True_, 3.0, np.float64(3.0), 3.5, "3", None, [3], torch.tensor(3.0)]
)
@pytest.mark.parametrize("name", ["capacity", "num_envs", "n_step", "frame_stack", "seed"])
def test_what_is_no_integer_is_refused_by_name(name, wrong):
    if name == "seed" and wrong is None:
        return
    with pytest.raises(TypeError, match=rf"{name} is .*: it must be an integer"):
        make(**{name: wrong})


@pytest.mark.parametrize("wrong", [True, np.True_, "0.9", None, 1j, [0.9]])
def test_what_is_no_number_is_refused_by_name(wrong):
    with pytest.raises(TypeError, match=r"gamma is .*: it must be a number"):
        make(gamma=wrong)
    with pytest.raises(TypeError, match=r"alpha is .*: it must be a number"):
        Prioritized(alpha=wrong)
    with pytest.raises(TypeError, match=r"eta is .*: it must be a number"):
        Recent(eta=wrong)


@pytest.mark.parametrize("shape", [(6.0, 8, 8), (6.7, 8, 8), (True, 8, 8), ("6", 8, 8), "688", 6, None])
def test_shapes_are_of_integers(shape):
    for name in ("obs_shape", "action_shape"):
        with pytest.raises(TypeError, match=rf"{name}.* is .*: it must be a tuple of integers"):
            make(**{name: shape})
    with pytest.raises(TypeError, match=r"extras\['prior'\] is .*: it must be a tuple of integers"):
        make(extras={"prior": shape})


def test_keys_are_strings():
    with pytest.raises(TypeError, match=r"obs_shape has the key \('agent', 'pixels'\): keys must be strings"):
        make(obs_shape={("agent", "pixels"): (6, 8, 8)})
    with pytest.raises(TypeError, match="extras has the key 1: keys must be strings"):
        make(extras={1: (2,)})


@pytest.mark.parametrize("dtype", [np.uint8, "uint8", np.dtype("uint8")])
def test_dtypes_are_those_of_torch(dtype):
    for name in ("obs_dtype", "action_dtype"):
        with pytest.raises(TypeError, match=rf"{name}.* is .*: it must be a dtype of torch"):
            make(**{name: dtype})
    with pytest.raises(ValueError, match=r"action_dtype is torch\.complex64: store"):
        make(action_dtype=torch.complex64)


def test_a_sampler_is_a_name_or_its_options():
    with pytest.raises(TypeError, match="sampler is 3: it must be one of uniform, prioritized, recent"):
        make(sampler=3)


def test_the_view_takes_them_too():
    buffer = drive(make())
    view = FineTuneView(buffer, np.float32(0.5), horizon=np.int64(2))
    assert torch.allclose(view.returns, torch.full((10,), 1.5))
    with pytest.raises(TypeError, match=r"horizon is 2\.0: it must be an integer"):
        FineTuneView(buffer, 0.5, horizon=2.0)


def test_options_of_samplers_compare_as_plain_numbers():
    assert asdict(Recent(eta=np.float64(0.9), floor=np.int8(3))) == {"eta": 0.9, "floor": 3}
