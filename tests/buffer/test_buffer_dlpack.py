"""Arrays of other libraries are added as they are, through dlpack."""

import numpy as np
import pytest
import torch

from covr_fast import ReplayBuffer


class Foreign:
    """An array of a library that has nothing but dlpack."""

    def __init__(self, values) -> None:
        self._tensor = torch.as_tensor(values)

    def __dlpack__(self, **options):
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._tensor.__dlpack_device__()


class Broken(Foreign):
    def __dlpack__(self, **_):
        raise BufferError("this memory is not exported")


def buffer() -> ReplayBuffer:
    return ReplayBuffer(20, num_envs=2, obs_shape=(2, 4, 4), action_shape=(1,), seed=0, extras={"prior": ()})


def rows() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "obs": rng.integers(256, size=(2, 2, 4, 4), dtype=np.uint8),
        "action": rng.random((2, 1), np.float32),
        "reward": rng.random(2),
        "next_obs": rng.integers(256, size=(2, 2, 4, 4), dtype=np.uint8),
        "terminated": np.array([True, False]),
        "truncated": np.array([False, False]),
        "env_ids": np.array([1, 0]),
        "prior": rng.random(2, np.float32),
    }


def test_foreign_arrays_are_stored_like_numpys():
    plain, foreign = buffer(), buffer()
    index = plain.add(**rows())
    assert torch.equal(foreign.add(**{name: Foreign(value) for name, value in rows().items()}), index)
    a, b = plain.get(index), foreign.get(index)
    for name in "obs", "next_obs", "action", "reward", "terminated":
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(a.extras["prior"], b.extras["prior"])


def test_a_transposed_foreign_array_is_read_as_it_is_seen():
    one, other = buffer(), buffer()
    given = rows()
    index = one.add(**given)
    given["obs"] = Foreign(
        torch.from_numpy(given["obs"]).permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    )
    other.add(**given)
    assert torch.equal(one.observations(index), other.observations(index))


@pytest.mark.parametrize("name", ["obs", "action", "reward", "terminated", "env_ids", "prior"])
def test_memory_that_is_not_exported_is_named(name):
    empty = buffer()
    with pytest.raises(
        ValueError, match=f"^{name} is a Broken that torch.from_dlpack cannot read .*exported"
    ):
        empty.add(**rows() | {name: Broken(rows()[name])})
    assert len(empty) == 0


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("obs", torch.zeros(2, 2, 4, 4), "obs"),
        ("obs", torch.zeros(2, 2, 4, 5, dtype=torch.uint8), "obs has shape"),
        ("action", torch.zeros(2, 1, dtype=torch.complex64), "action has dtype complex64"),
        ("terminated", torch.zeros(2), "terminated has dtype float32: it must be bool"),
    ],
)
def test_a_foreign_array_of_another_dtype_or_shape_is_named(name, wrong, message):
    empty = buffer()
    with pytest.raises(ValueError, match=message):
        empty.add(**rows() | {name: Foreign(wrong)})
    assert len(empty) == 0
