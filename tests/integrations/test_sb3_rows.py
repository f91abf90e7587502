"""What the SB3 drop-in's add() takes, and what it refuses by name instead of storing something else."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

pytest.importorskip("stable_baselines3")
from sb3_pixels import assert_same, assert_same_arrays, drawn, pair_of
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer

from covr_fast.integrations.sb3 import FastReplayBuffer

IMAGE = spaces.Box(0, 255, (3, 8, 8), np.uint8)
VECTOR = spaces.Box(-1, 1, (3,), np.float32)
FORCE = spaces.Box(-1, 1, (2, 3), np.float32)
CHOICE = spaces.Discrete(4)


def row(obs=None, next_obs=None, action=None, reward=None, done=None, infos=None, *, space=VECTOR, n=2):
    """A good transition of n environments with what is given in it."""
    zero = np.zeros((n, *space.shape), space.dtype)
    given = (obs, next_obs, action, reward, done, infos)
    good = (zero, zero, np.zeros((n, 2, 3), np.float32), np.zeros(n), np.zeros(n, bool), [{}] * n)
    return [a if a is not None else b for a, b in zip(given, good, strict=True)]


def pair(space=VECTOR, action=FORCE, n=2):
    kind = DictReplayBuffer if isinstance(space, spaces.Dict) else SB3ReplayBuffer
    return pair_of(20, space, action, n, kind)


IMAGES = np.zeros((2, 3, 8, 8))
REFUSED = {
    "an action of transposed shape": (
        {"action": np.zeros((2, 3, 2))},
        r"action has shape \(2, 3, 2\): .*\(2, 2, 3\)",
    ),
    "actions of three environments": ({"action": np.zeros((3, 2, 2))}, "action has shape"),
    "actions without environments": ({"action": np.zeros(12)}, "action has shape"),
    "obs of swapped axes": ({"obs": np.zeros((3, 2))}, r"obs has shape \(3, 2\): it must be \(2, 3\)"),
    "flat obs": ({"obs": np.zeros(6)}, "obs has shape"),
    "one obs for all": ({"obs": np.zeros(3)}, "obs has shape"),
    "one next_obs for all": ({"next_obs": np.zeros((1, 3))}, r"next_obs has shape \(1, 3\)"),
    "one reward for all": ({"reward": np.zeros(1)}, r"reward has shape \(1,\)"),
    "a scalar reward": ({"reward": 0.0}, r"reward has shape \(\)"),
    "dones of three environments": ({"done": np.zeros(3, bool)}, r"done has shape \(3,\)"),
    "infos of one environment": ({"infos": [{}]}, "infos has 1 entries"),
    "timeouts of one environment": (
        {"infos": {"TimeLimit.truncated": np.zeros(1, bool)}},
        "TimeLimit.truncated",
    ),
    "300 in a picture": (
        {"obs": IMAGES.astype(np.int64) + 300},
        r"obs holds 300 \(int64\), which would be stored as 44 \(uint8\)",
    ),
    "-1 in a picture": ({"next_obs": IMAGES.astype(np.int8) - 1}, "next_obs holds -1 .* as 255"),
    "256.0 in a picture": ({"obs": IMAGES + 256}, r"obs holds 256\.0"),
    "pictures of floats": ({"obs": IMAGES.astype(np.float32) + 0.5}, r"obs holds 0\.5 \(float32\)"),
    "NaN in a picture": ({"obs": IMAGES + np.nan}, "obs holds nan"),
    "NaN as reward": ({"reward": np.array([0, np.nan])}, "reward is NaN"),
    "a reward beyond float32": ({"reward": np.array([0, 1e300])}, "reward is NaN or infinite"),
    "a reward that float32 rounds": ({"reward": np.array([0, 16777217])}, "reward holds 16777217"),
    "an action that float32 rounds": (
        {"action": np.full((2, 2, 3), 16777217)},
        r"action holds 16777217 \(int64\), which would be stored as 16777216\.0 \(float32\)",
    ),
    "NaN as action": ({"action": np.full((2, 2, 3), np.nan)}, "action is NaN"),
    "half an end": ({"done": np.array([0, 0.5])}, r"done holds 0\.5"),
    "an end that is no number": ({"done": np.array([0, np.nan])}, "done holds nan"),
}


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("what", REFUSED)
def test_shapes_and_values_are_refused_by_name(what):
    """Nothing half-written is left behind, whether or not something was there."""
    given, message = REFUSED[what]
    space = IMAGE if "picture" in what else VECTOR
    for before in (0, 3):
        theirs, ours = pair(space)
        for i in range(before):
            for buffer in (theirs, ours):
                buffer.add(*row(reward=np.array([i, -i]), space=space))
        with pytest.raises(ValueError, match=message):
            ours.add(*row(**given, space=space))
        assert (ours.pos, ours.full, ours.size()) == (before, False, before)
        for buffer in (theirs, ours):
            buffer.add(*row(reward=np.array([7, 8]), space=space))
        np.testing.assert_array_equal(ours.rewards, theirs.rewards)
        assert_same(drawn(theirs), drawn(ours))


@pytest.mark.parametrize(
    "dtype, value",
    [
        (np.int8, 300),
        (np.int8, -129),
        (np.uint8, -1),
        (np.int32, 2**31 + 5),
        (np.int64, 2**63),
        (np.uint64, -1),
    ],
)
def test_integers_out_of_range(dtype, value):
    info = np.iinfo(dtype)
    space = spaces.Box(info.min, info.max, (3,), dtype)
    _, ours = pair(space)
    wide = np.uint64 if value >= 2**63 else np.int64
    with pytest.raises(ValueError, match=rf"obs holds {value} \({np.dtype(wide)}\)"):
        ours.add(*row(obs=np.full((2, 3), value, wide), space=space))
    actions = FastReplayBuffer(20, VECTOR, space, "cpu", 2)
    with pytest.raises(ValueError, match=rf"action holds {value}"):
        actions.add(*row(action=np.full((2, 3), value, wide)))


def test_a_key_of_dict_observations_is_named():
    space = spaces.Dict({"camera": IMAGE, "pose": VECTOR})
    _, ours = pair(space)
    good = {name: np.zeros((2, *part.shape), part.dtype) for name, part in space.items()}
    zero = np.zeros(2), np.zeros(2, bool), [{}, {}]
    for bad, message in (
        ({"camera": np.full((2, 3, 8, 8), 300)}, r"next_obs\['camera'\] holds 300"),
        ({"pose": np.zeros((2, 4))}, r"next_obs\['pose'\] has shape \(2, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.add(good, {**good, **bad}, np.zeros((2, 2, 3)), *zero)
    with pytest.raises(ValueError, match=r"obs lacks the key 'pose'"):
        ours.add({"camera": good["camera"]}, good, np.zeros((2, 2, 3)), *zero)


@pytest.mark.parametrize(
    "given",
    [
        {"obs": np.ones((2, 3))},  # float64 is rounded to float32, as SB3 does
        {"obs": np.full((2, 3), 0.1), "next_obs": np.full((2, 3), 1 / 3)},
        {"obs": np.ones((2, 3), np.int64)},
        {"action": np.ones((2, 6))},
        {"action": np.full((2, 2, 3), 0.1)},
        {"reward": np.full(2, 0.1)},
        {"reward": np.array([1, 2])},
        {"done": np.array([1, 0])},
        {"done": np.array([1.0, 0.0])},
        {"infos": [{"TimeLimit.truncated": True}, {}], "done": np.array([True, True])},
    ],
)
def test_what_sb3_stores_unchanged_is_taken(given):
    buffers = theirs, ours = pair()
    for buffer in buffers:
        buffer.add(*row(**given))
    assert_same_arrays(theirs, ours)


def test_one_environment_without_its_axis():
    buffers = theirs, ours = pair(n=1)
    given = np.ones(3, np.float32), np.full(3, 2.0), np.ones((2, 3)), 1.5, True, [{}]
    for buffer in buffers:
        buffer.add(*given)
    assert_same_arrays(theirs, ours)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    "space", [CHOICE, spaces.MultiDiscrete([3, 4]), spaces.MultiBinary(3), FORCE], ids=str
)
def test_spaces(space, n):
    """Observations and actions of every kind, as the vectorised environments give them."""
    for obs_space, action_space in ((space, FORCE), (VECTOR, space)):
        buffers = pair(obs_space, action_space, n)
        obs_space.seed(0), action_space.seed(0)
        for i in range(9):
            obs, next_obs = (np.stack([obs_space.sample() for _ in range(n)]) for _ in range(2))
            action = np.stack([action_space.sample() for _ in range(n)])
            for buffer in buffers:
                buffer.add(obs, next_obs, action, np.full(n, i), np.full(n, i == 4), [{}] * n)
        assert_same(*map(drawn, buffers))


def test_extend_and_arrays_in_one_piece():
    """As SB3's buffers take and give them: [steps, n_envs, ...], then [n_envs * steps, ...]."""
    buffers = pair()
    rng = np.random.default_rng(0)
    obs, next_obs = rng.random((2, 6, 2, 3), np.float32)
    infos = [[{"TimeLimit.truncated": i == 3}, {}] for i in range(6)]
    rest = (
        rng.random((6, 2, 2, 3), np.float32),
        rng.random((6, 2)),
        np.arange(12).reshape(6, 2) % 7 == 6,
        infos,
    )
    for buffer in buffers:
        buffer.extend(obs, next_obs, *rest)
    assert_same(*map(drawn, buffers))
    for name in ("observations", "rewards", "dones"):
        flat = [buffer.swap_and_flatten(np.asarray(getattr(buffer, name))) for buffer in buffers]
        np.testing.assert_array_equal(*flat)
    assert torch.equal(*(buffer.to_torch(buffer.rewards) for buffer in buffers))
