"""ReplayBuffer against an oracle that stores everything."""

import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from buffer_oracle import Oracle, StackedEnv, Step

from covr_fast import ReplayBuffer
from covr_fast.buffer import storage


class Driver:
    """Feeds the same steps to a buffer and to the oracle."""

    def __init__(self, buffer: ReplayBuffer, envs: list[StackedEnv], seed: int = 0) -> None:
        self.buffer = buffer
        self.envs = envs
        self.oracle = Oracle(len(envs), buffer.n_step, buffer.gamma)
        self.rng = np.random.default_rng(seed)

    def add(self, env_ids: list[int] | None = None, as_torch: bool = False) -> torch.Tensor:
        ids = list(range(len(self.envs))) if env_ids is None else env_ids
        obs, next_obs, terminated, truncated = zip(*(self.envs[e].step() for e in ids), strict=True)
        action = self.rng.standard_normal((len(ids), 2)).astype(np.float32)
        reward = self.rng.standard_normal(len(ids)).astype(np.float32)
        prior = self.rng.standard_normal((len(ids), 3)).astype(np.float32)
        columns = [
            np.stack(obs),
            action,
            reward,
            np.stack(next_obs),
            np.array(terminated),
            np.array(truncated),
        ]
        if as_torch:
            columns = [torch.from_numpy(column) for column in columns]
        index = self.buffer.add(*columns, env_ids=None if env_ids is None else np.array(ids), prior=prior)
        for i, e in enumerate(ids):
            row = {"obs": obs[i]}, action[i], float(reward[i]), {"obs": next_obs[i]}
            step = Step(*row, terminated[i], truncated[i], extras={"prior": prior[i]})
            assert index[i] == self.oracle.add(e, step)
        return index

    def check(self, batch_size: int = 64) -> None:
        self.check_batch(self.buffer.sample(batch_size, dtype=torch.uint8))

    def check_batch(self, batch) -> None:
        assert self.buffer.contains(batch.index).all()
        indices = batch.index.tolist()
        steps = [self.oracle.step(index) for index in indices]
        rows = map(self.oracle.n_step_row, indices)
        reward, next_obs, discount, terminated, truncated = zip(*rows, strict=True)
        axes = (2, 0, 1) if self.envs[0].channels_last else (0, 1, 2)
        for got, expected in (batch.obs, [step.obs for step in steps]), (batch.next_obs, next_obs):
            pictures = [observation["obs"].transpose(axes) for observation in expected]
            np.testing.assert_array_equal(got.numpy(), np.stack(pictures))
        np.testing.assert_array_equal(batch.action.numpy(), [step.action for step in steps])
        np.testing.assert_array_equal(batch.extras["prior"].numpy(), [step.extras["prior"] for step in steps])
        np.testing.assert_allclose(batch.reward.numpy(), reward, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(batch.discount.numpy(), discount, rtol=1e-6)
        assert batch.terminated.tolist() == list(terminated)
        assert batch.truncated.tolist() == list(truncated)


def make(
    capacity: int = 50,
    num_envs: int = 3,
    stack: int = 3,
    frame: tuple[int, ...] = (2, 7, 5),
    padding: str = "repeat",
    max_length: int = 10,
    channels_last: bool = False,
    seed: int = 0,
    steps: int = 0,
    **options,
) -> Driver:
    """A driver that has added `steps` steps."""
    rng = np.random.default_rng(seed)
    envs = [StackedEnv(rng, frame, stack, padding, max_length, channels_last) for _ in range(num_envs)]
    obs_shape = (*frame[:-1], frame[-1] * stack) if channels_last else (frame[0] * stack, *frame[1:])
    buffer = ReplayBuffer(
        capacity,
        num_envs=num_envs,
        obs_shape=obs_shape,
        action_shape=(2,),
        frame_stack=stack,
        seed=seed,
        extras={"prior": (3,)},
        channels_last=channels_last,
        **options,
    )
    driver = Driver(buffer, envs, seed)
    for _ in range(steps):
        driver.add()
    return driver


@pytest.mark.parametrize("padding", ["repeat", "zero", "full"])
@pytest.mark.parametrize("stack", [1, 2, 3, 4])
@pytest.mark.parametrize("n_step", [1, 3])
def test_rows_equal_what_was_added(padding, stack, n_step):
    driver = make(stack=stack, padding=padding, n_step=n_step)
    for i in range(120):
        driver.add(as_torch=bool(i % 2))
        if i >= n_step:
            driver.check()
    assert len(driver.buffer) == driver.buffer.capacity


@pytest.mark.parametrize("capacity, num_envs", [(1, 1), (2, 2), (7, 3), (50, 4), (64, 8)])
@pytest.mark.parametrize("max_length", [1, 2, 40])
def test_capacity_is_exact_whatever_the_episodes(capacity, num_envs, max_length):
    driver = make(capacity=capacity, num_envs=num_envs, max_length=max_length)
    for i in range(100):
        driver.add()
        assert len(driver.buffer) <= capacity
        if i % 9 == 0:
            driver.check(16)
    assert len(driver.buffer) == capacity


def test_short_episodes_of_large_frames_cost_capacity_but_never_correctness():
    driver = make(capacity=400, num_envs=2, frame=(3, 84, 84), max_length=3)
    for i in range(500):
        driver.add()
        if i % 50 == 0:
            driver.check(16)
    assert 200 < len(driver.buffer) < 400


def test_environments_in_any_order():
    driver = make(num_envs=5, capacity=61, n_step=2)
    rng = np.random.default_rng(1)
    for i in range(300):
        driver.add(rng.permutation(5)[: rng.integers(1, 6)].tolist())
        if i > 20:
            driver.check(16)


@pytest.mark.parametrize("channels_last", [False, True])
def test_channels_last_input_and_memory(channels_last):
    driver = make(frame=(7, 5, 2) if channels_last else (2, 7, 5), channels_last=channels_last, steps=60)
    driver.check()
    batch = driver.buffer.sample(32, dtype=torch.uint8, memory_format=torch.channels_last)
    assert batch.obs.is_contiguous(memory_format=torch.channels_last)
    driver.check_batch(batch)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16, torch.uint16])
def test_channels_last_memory_of_images_of_other_types(dtype, device):
    options = {"num_envs": 1, "obs_shape": (6, 5, 4), "action_shape": (), "frame_stack": 3, "seed": 0}
    buffer = ReplayBuffer(50, obs_dtype=dtype, device=device, **options)
    rng, no, numpy_type = np.random.default_rng(0), np.zeros(1, bool), buffer._options.keys[0].numpy_dtype
    frames = rng.integers(0, 30_000, (33, 1, 2, 5, 4)).astype(numpy_type)
    stacks = [np.concatenate(frames[t : t + 3], axis=1) for t in range(31)]
    for t in range(30):
        buffer.add(stacks[t], np.zeros(1), np.full(1, t), stacks[t + 1], no, no)
    batch = buffer.sample(64, memory_format=torch.channels_last)
    assert batch.obs.is_contiguous(memory_format=torch.channels_last)
    for i, t in enumerate(batch.reward.int().tolist()):
        np.testing.assert_array_equal(batch.obs[i].cpu(), stacks[t][0])
        np.testing.assert_array_equal(batch.next_obs[i].cpu(), stacks[t + 1][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floats_are_bytes_over_255(dtype):
    driver = make(capacity=3000, frame=(3, 16, 9), steps=1000)
    batch = driver.buffer.sample(512, dtype=dtype)
    pixels = driver.buffer.observations(batch.index)
    assert len(pixels.unique()) == 255  # every byte that StackedEnv draws
    torch.testing.assert_close(batch.obs, (pixels.float() / 255).to(dtype), rtol=0, atol=0)


def window(picture: np.ndarray, offset: torch.Tensor, augment: str, pad: int) -> np.ndarray:
    """What an augmentation makes of a picture [C, H, W]."""
    y, x = offset.tolist()
    height, width = picture.shape[1:]
    if augment == "translate":
        return np.pad(picture, ((0, 0), (y, 2 * pad - y), (x, 2 * pad - x)))
    if augment == "shift":
        picture = np.pad(picture, ((0, 0), (pad, pad), (pad, pad)), mode="edge")
    else:
        height, width = height - 2 * pad, width - 2 * pad
    return picture[:, y : y + height, x : x + width]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [8, 700])  # below and above the size that is written past the cache
@pytest.mark.parametrize(
    "augment, pad, frame, size",
    [
        ("shift", 4, (3, 20, 18), (9, 20, 18)),
        ("shift", 5, (1, 3, 2), (3, 3, 2)),  # wider than the picture
        ("crop", 4, (3, 20, 18), (9, 12, 10)),
        ("translate", 4, (3, 20, 18), (9, 28, 26)),
        ("translate", 4, (1, 16, 32), (3, 24, 40)),  # rows of whole blocks of 16
        ("translate", 9, (2, 3, 1), (6, 21, 19)),  # smaller than what surrounds it
        ("translate", 0, (1, 5, 7), (3, 5, 7)),
    ],
)
def test_augmented_pictures_are_windows_at_the_offset(augment, pad, frame, size, batch_size, dtype):
    driver = make(frame=frame, capacity=300, steps=100)
    batch = driver.buffer.sample(batch_size, augment=augment, pad=pad, dtype=dtype)
    assert batch.obs.shape == batch.next_obs.shape == (batch_size, *size)
    assert batch.obs_offset.min() == 0 or batch_size < 100
    assert batch.obs_offset.max() == 2 * pad or batch_size < 100
    assert torch.equal(batch.obs_offset, batch.next_obs_offset) == (augment == "translate")
    for i, index in enumerate(batch.index.tolist()):
        for got, offset, picture in (
            (batch.obs[i], batch.obs_offset[i], driver.oracle.step(index).obs["obs"]),
            (batch.next_obs[i], batch.next_obs_offset[i], driver.oracle.n_step_row(index)[1]["obs"]),
        ):
            expected = torch.from_numpy(window(picture, offset, augment, pad))
            expected = expected if dtype == torch.uint8 else (expected.float() / 255).to(dtype)
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_translated_pictures_are_alone_on_black(memory_format):
    """Equal to torch's padding, and written everywhere: `out` held NaN before."""
    driver = make(frame=(3, 12, 10), capacity=300, steps=100)
    options = {"augment": "translate", "pad": 3, "memory_format": memory_format}
    out = driver.buffer.sample(64, **options)
    out.obs.fill_(torch.nan), out.next_obs.fill_(torch.nan)
    batch = driver.buffer.sample(64, out=out, **options)
    y, x = batch.obs_offset.unbind(1)
    for stacks, pictures in (
        (batch.obs, driver.buffer.get(batch.index).obs),
        (batch.next_obs, driver.buffer.get(batch.index).next_obs),
    ):
        rows, columns = y[:, None] + torch.arange(12), x[:, None] + torch.arange(10)
        expected = torch.zeros(64, 18, 16, 9)
        expected[torch.arange(64)[:, None, None], rows[:, :, None], columns[:, None]] = pictures.movedim(1, 3)
        assert torch.equal(stacks, expected.movedim(3, 1))
    assert len(batch.obs_offset.unique(dim=0)) > 20


def test_only_a_translation_has_one_offset_for_obs_and_next_obs():
    """Every offset of [0, 2 * pad] comes, about as often, and y is independent of x."""
    driver = make(steps=30)
    for augment in ("shift", "crop", "translate"):
        batch = driver.buffer.sample(5000, augment=augment, pad=1, dtype=torch.uint8)
        pairs = {
            "y, x": batch.obs_offset,
            "of both": torch.stack([batch.obs_offset, batch.next_obs_offset], 2)[:, 0],
        }
        shared = augment == "translate"
        for name, pair in pairs.items():
            counts = torch.bincount(3 * pair[:, 0] + pair[:, 1], minlength=9).view(3, 3) / 5000
            expected = torch.eye(3) / 3 if shared and name == "of both" else torch.full((3, 3), 1 / 9)
            torch.testing.assert_close(counts, expected, rtol=0, atol=0.03)


def test_batches_keep_their_memory_while_anyone_looks():
    driver = make(capacity=300, frame=(3, 32, 32), steps=100)
    view = driver.buffer.sample(64, dtype=torch.uint8).obs[5:9, :3]  # all that is left of its batch
    before = view.clone()
    batches = [driver.buffer.sample(64, dtype=torch.uint8) for _ in range(20)]
    assert torch.equal(view, before)
    for batch in batches:
        driver.check_batch(batch)
    del batches, batch
    addresses = {driver.buffer.sample(64, dtype=torch.uint8).obs.data_ptr() for _ in range(20)}
    assert len(addresses) <= 2  # one batch's memory, over and over


def test_a_seed_and_its_batch_number_decide_the_batch():
    a, b, other = make(steps=30), make(steps=30), make(seed=1, steps=30)
    first = a.buffer.sample(32, augment="shift")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    same = b.buffer.sample(32, augment="shift")
    torch.set_num_threads(threads)
    assert torch.equal(first.index, same.index)
    assert torch.equal(first.obs, same.obs)
    assert torch.equal(first.next_obs_offset, same.next_obs_offset)
    assert not torch.equal(first.index, a.buffer.sample(32).index)
    assert not torch.equal(first.index, other.buffer.sample(32).index)


def test_uniform_over_unequal_streams():
    driver = make(num_envs=3, capacity=90, max_length=7)
    for i in range(200):
        driver.add([0, 1, 2] if i % 10 == 0 else ([0] if i > 60 else [1]))
    n = len(driver.buffer)
    counts = torch.zeros(n)
    order = {}
    draws = 400 * n
    for index in driver.buffer.sample(draws, dtype=torch.uint8).index.tolist():
        counts[order.setdefault(index, len(order))] += 1
    assert len(order) == n
    expected = draws / n
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_squared - (n - 1)) < 5 * (2 * (n - 1)) ** 0.5


def test_incomplete_n_steps_are_not_sampled():
    driver = make(num_envs=1, capacity=20, n_step=5, max_length=10**6, steps=4)
    with pytest.raises(IndexError, match="nothing to sample"):
        driver.buffer.sample(1)
    driver.add()
    assert driver.buffer.sample(50).index.unique().tolist() == [0]


def test_a_cut_ends_the_segment_and_bootstraps():
    driver = make(num_envs=2, n_step=3, max_length=10**6, steps=10)
    driver.buffer.cut(np.array([1]))
    driver.oracle.streams[1][-1].cut = True
    driver.envs[1].reset()
    for _ in range(10):
        driver.add()
    batch = driver.buffer.sample(500, dtype=torch.uint8)
    driver.check_batch(batch)
    last = batch.index == 9 * 2 + 1
    assert last.any()
    assert batch.discount[last].tolist() == pytest.approx([0.99] * int(last.sum()))


def test_jumps_without_stacks_are_stored_as_they_are():
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer(40, num_envs=2, obs_shape=(3, 6, 6), action_shape=(), n_step=2, seed=0)
    obs, next_obs = rng.integers(0, 256, (2, 30, 2, 3, 6, 6), dtype=np.uint8)
    false = np.zeros(2, bool)
    for i in range(30):
        buffer.add(obs[i], np.zeros(2), np.full(2, i), next_obs[i], false, false)
    batch = buffer.sample(100, dtype=torch.uint8)
    for i, index in enumerate(batch.index.tolist()):
        np.testing.assert_array_equal(batch.obs[i], obs[index // 2, index % 2])
        np.testing.assert_array_equal(batch.next_obs[i], next_obs[index // 2, index % 2])
        assert batch.reward[i] == index // 2  # no reward of beyond the jump


class TestContract:
    def stacks(self, n=12, size=30):
        frames = np.random.default_rng(0).integers(0, 256, (n + 3, 1, 3, size, size), dtype=np.uint8)
        return [np.concatenate(frames[i : i + 3], axis=1) for i in range(n)]

    def add(self, buffer, obs, next_obs, terminated=False):
        no = np.zeros(1, bool)
        return buffer.add(obs, np.zeros((1, 1)), np.zeros(1), next_obs, no | terminated, no)

    def add_all(self, buffer, steps):
        for obs, next_obs in steps:
            self.add(buffer, obs, next_obs)

    def buffer(self, size=30):
        return ReplayBuffer(50, num_envs=1, obs_shape=(9, size, size), action_shape=(1,), frame_stack=3)

    def test_next_obs_of_the_following_episode(self):
        buffer, stacks = self.buffer(), self.stacks()
        self.add_all(buffer, pairwise(stacks[:6]))
        reset = np.tile(stacks[9][:, :3], (1, 3, 1, 1))
        with pytest.raises(
            ValueError, match=r"row 0 \(environment 0\).*next_obs are not the newer.*frame_stack=1"
        ):
            self.add(buffer, stacks[5], reset, terminated=True)
        assert len(buffer) == 5
        self.add(buffer, stacks[5], stacks[6], terminated=True)  # and nothing had been written
        self.add(buffer, reset, np.concatenate([reset[:, 3:], stacks[10][:, :3]], axis=1))

    def test_a_reset_that_nobody_mentioned(self):
        buffer, stacks = self.buffer(), self.stacks()
        self.add_all(buffer, pairwise(stacks[:6]))
        with pytest.raises(ValueError, match=r"obs is not next_obs of the step before.*cut"):
            self.add(buffer, stacks[8], stacks[9])
        buffer.cut()
        self.add(buffer, stacks[8], stacks[9])

    def test_one_changed_pixel_of_a_small_frame_is_found_at_once(self):
        buffer, stacks = self.buffer(), self.stacks()
        broken = [stacks[0], *(stack.copy() for stack in stacks[1:])]
        for stack in broken[4:]:
            stack[0, 1, 17, 3] ^= 1
        with pytest.raises(ValueError, match="older frames of next_obs"):
            self.add_all(buffer, zip(stacks, broken[1:], strict=False))
        assert len(buffer) == 3

    @pytest.mark.parametrize("which", ["obs", "next_obs"])
    @pytest.mark.parametrize("frame, y, x", [(0, 0, 0), (0, 83, 83), (1, 41, 7)])
    def test_a_pixel_changed_in_one_of_the_two_is_found_within_thirty_two_steps(self, which, frame, y, x):
        buffer, stacks = self.buffer(84), self.stacks(57, 84)
        changed = [stack.copy() for stack in stacks]
        for stack in changed[5:]:
            stack[0, 3 * frame, y, x] ^= 1
        obs, next_obs = (changed, stacks) if which == "obs" else (stacks, changed)
        with pytest.raises(ValueError, match="oldest first"):
            self.add_all(buffer, zip(obs, next_obs[1:], strict=False))
        assert 4 <= len(buffer) <= 36

    def test_newest_first_stacks(self):
        buffer, stacks = self.buffer(), self.stacks()
        flip = [stack.reshape(1, 3, 3, 30, 30)[:, ::-1].reshape(1, 9, 30, 30).copy() for stack in stacks]
        with pytest.raises(ValueError, match="oldest first"):
            self.add(buffer, flip[0], flip[1])


def test_rows_are_checked():
    driver = make(num_envs=2)
    obs = np.zeros((2, 6, 7, 5), np.uint8)
    good = {"action": np.zeros((2, 2)), "reward": np.zeros(2)}
    good |= {"terminated": np.zeros(2, bool), "truncated": np.zeros(2, bool)}
    add, prior = driver.buffer.add, np.zeros((2, 3))
    with pytest.raises(ValueError, match=r"extras \[\], declared are \['prior'\]"):
        add(obs=obs, next_obs=obs, **good)
    with pytest.raises(ValueError, match="dtype float32: it must be uint8"):
        add(obs=obs.astype(np.float32), next_obs=obs, **good, prior=prior)
    with pytest.raises(ValueError, match=r"next_obs has shape.*\[rows, 6, 7, 5\]"):
        add(obs=obs, next_obs=obs[:, :3], **good, prior=prior)
    with pytest.raises(ValueError, match=r"action has shape \[2, 3\]: it must be \[rows, 2\]"):
        add(obs=obs, next_obs=obs, **{**good, "action": np.zeros((2, 3))}, prior=prior)
    with pytest.raises(ValueError, match="prior has 1 rows, but reward has 2"):
        add(obs=obs, next_obs=obs, **good, prior=prior[:1])
    with pytest.raises(ValueError, match="terminated has dtype float64: it must be bool"):
        add(obs=obs, next_obs=obs, **{**good, "terminated": np.zeros(2)}, prior=prior)
    with pytest.raises(ValueError, match=r"env_ids\[1\] = 2 is not in \[0, num_envs = 2\)"):
        add(obs=obs, next_obs=obs, **good, prior=prior, env_ids=np.array([0, 2]))
    with pytest.raises(ValueError, match="contains 1 twice"):
        add(obs=obs, next_obs=obs, **good, prior=prior, env_ids=np.array([1, 1]))
    one = {name: values[:1] for name, values in good.items()}
    with pytest.raises(ValueError, match="1 rows for 2 environments: pass env_ids"):
        add(obs=obs[:1], next_obs=obs[:1], **one, prior=prior[:1])
    assert len(driver.buffer) == 0


def test_single_transitions_by_id():
    driver = make(capacity=30, num_envs=2)
    for _ in range(40):
        index = driver.add()
    buffer, oracle = driver.buffer, driver.oracle
    stored = torch.arange(25 * 2, 40 * 2)
    assert buffer.contains(stored).all()
    assert not buffer.contains([25 * 2 - 1, 40 * 2, -1]).any()
    for i, got in zip(stored.tolist(), buffer.observations(stored), strict=True):
        np.testing.assert_array_equal(got, oracle.step(i).obs["obs"])
    for i, got in zip(stored.tolist(), buffer.frames(stored), strict=True):
        np.testing.assert_array_equal(got, oracle.step(i).obs["obs"][-2:])
    for i, got in zip(stored.tolist(), buffer.actions(stored), strict=True):
        np.testing.assert_array_equal(got, oracle.step(i).action)
    buffer.set_extras(index, prior=torch.full((2, 3), 7.0))
    assert (buffer.extras(index)["prior"] == 7).all()
    for i, got in zip(stored[:-2].tolist(), buffer.extras(stored[:-2])["prior"], strict=True):
        np.testing.assert_array_equal(got, oracle.step(i).extras["prior"])
    for call in (buffer.observations, buffer.frames, buffer.actions, buffer.extras):
        with pytest.raises(IndexError, match="overwritten"):
            call([25 * 2 - 1])
    with pytest.raises(IndexError, match="overwritten"):
        buffer.set_extras([0], prior=torch.zeros(1, 3))


def test_by_place_in_the_rings():
    driver = make(capacity=11, num_envs=3)  # rings of 4, 4 and 3 places
    buffer, places, starts = driver.buffer, (4, 4, 3), (6, 0, 4)
    for wrong in ((1, -1, 0), (1, 2)):
        with pytest.raises(ValueError, match=r"start_at\(\) needs|t has shape \(2,\): it must be \(3,\)"):
            buffer.start_at(wrong)
    buffer.start_at(starts)
    driver.oracle.streams = [[None] * start for start in starts]
    driver.add()
    everywhere = np.indices((3, 4)).reshape(2, -1)
    assert (buffer.ids_at(*everywhere) >= 0).sum() == 3
    with pytest.raises(ValueError, match=r"start_at\(\) needs an empty buffer"):
        buffer.start_at(starts)
    for _ in range(8):
        driver.add()
    ids = buffer.ids_at(*everywhere).reshape(3, 4)
    rings = {name: buffer.ring(name) for name in ("reward", "action", "prior", "terminated", "truncated")}
    for env, (start, n) in enumerate(zip(starts, places, strict=True)):
        for t in range(start + 9 - n, start + 9):
            assert ids[env, t % n] == t * 3 + env
            step = driver.oracle.step(t * 3 + env)
            truth = vars(step) | step.extras
            for name, ring in rings.items():
                np.testing.assert_array_equal(ring[env, t % n], np.float32(truth[name]))
    assert ids[2, 3] == -1
    for name in ("reward", "action", "prior"):
        rings[name][1, 0] = 7
    batch = buffer.get(ids[1, :1], n_step=1)
    assert batch.reward == 7
    assert (batch.action == 7).all()
    assert (batch.extras["prior"] == 7).all()
    for wrong, what in ((3, 0), "env_ids"), ((0, 4), "positions"), ((-1, 0), "env_ids"):
        with pytest.raises(IndexError, match=f"{what} must lie in"):
            buffer.ids_at(*([n] for n in wrong))


def test_dict_observations():
    rng = np.random.default_rng(0)
    pixels = [StackedEnv(np.random.default_rng(e), (1, 6, 6), 3) for e in range(2)]
    oracle = Oracle(2)
    buffer = ReplayBuffer(
        40,
        num_envs=2,
        obs_shape={"camera": (3, 6, 6), "pose": (4,), "wide": (3, 8, 2)},
        action_shape=(),
        action_dtype=torch.int64,
        frame_stack={"camera": 3},
        seed=0,
    )
    state = {"pose": rng.standard_normal((2, 4)).astype(np.float32), "wide": np.zeros((2, 3, 8, 2), np.uint8)}
    for _ in range(60):
        obs, next_obs, terminated, truncated = map(
            np.stack, zip(*(env.step() for env in pixels), strict=True)
        )
        following = {
            "pose": rng.standard_normal((2, 4)).astype(np.float32),
            "wide": rng.integers(0, 256, (2, 3, 8, 2), dtype=np.uint8),
        }
        action = rng.integers(0, 5, 2)
        row, next_row = {"camera": obs, **state}, {"camera": next_obs, **following}
        buffer.add(row, action, np.zeros(2), next_row, terminated, truncated)
        for e in range(2):
            parts = ({k: v[e] for k, v in part.items()} for part in (row, next_row))
            oracle.add(e, Step(next(parts), action[e], 0.0, next(parts), terminated[e], truncated[e], {}))
        state = following
    batch = buffer.sample(100, augment="shift", pad=1, dtype=torch.float32)
    assert batch.obs["pose"].dtype == torch.float32
    assert batch.action.dtype == torch.int64
    batch = buffer.sample(100, dtype=torch.uint8)
    for i, index in enumerate(batch.index.tolist()):
        step = oracle.step(index)
        assert batch.action[i] == step.action
        for name in ("camera", "pose", "wide"):
            np.testing.assert_array_equal(batch.obs[name][i], step.obs[name])
            np.testing.assert_array_equal(batch.next_obs[name][i], step.next_obs[name])
    with pytest.raises(ValueError, match=r"obs lacks the keys \['pose'\]"):
        buffer.add({"camera": obs, "wide": state["wide"]}, action, np.zeros(2), row, terminated, truncated)


@pytest.mark.parametrize("stack", [1, 4])
def test_vectors(stack):
    env = StackedEnv(np.random.default_rng(0), (5,), stack, "zero", dtype=np.float64)
    options = {"num_envs": 1, "obs_shape": (5 * stack,), "action_shape": (), "frame_stack": stack}
    buffer = ReplayBuffer(30, obs_dtype=torch.float64, seed=0, **options)
    rows = []
    for _ in range(100):
        obs, next_obs, *ends = env.step()
        rows.append((obs, next_obs))
        buffer.add(obs[None], np.zeros(1), np.zeros(1), next_obs[None], *(np.array([end]) for end in ends))
    batch = buffer.sample(64)
    for i, index in enumerate(batch.index.tolist()):
        np.testing.assert_array_equal(batch.obs[i], rows[index][0])
        np.testing.assert_array_equal(batch.next_obs[i], rows[index][1])


def test_memory_is_about_one_frame_per_transition():
    extras = {"prior": (6,), "mask": ()}
    buffer = ReplayBuffer(
        8000, num_envs=8, obs_shape=(9, 84, 84), action_shape=(6,), frame_stack=3, extras=extras
    )
    assert buffer.nbytes / 8000 <= 22_500


@pytest.mark.parametrize(
    "options, message",
    [
        ({"capacity": 1, "num_envs": 2}, "capacity is 1: it must be at least num_envs = 2"),
        ({"num_envs": 0}, "num_envs is 0"),
        ({"obs_shape": (8, 4, 4), "frame_stack": 3}, "not a multiple of frame_stack=3"),
        ({"frame_stack": 0}, "frame_stack is 0"),
        ({"n_step": 0}, "n_step is 0"),
        ({"n_step": 11, "capacity": 10}, "n_step is 11"),
        ({"gamma": 1.1}, "gamma is 1.1: it must lie in [0, 1]"),
        ({"gamma": -0.1}, "gamma is -0.1: it must lie in [0, 1]"),
        ({"gamma": np.nan}, "gamma is nan: it must lie in [0, 1]"),
        ({"seed": -1}, "seed is -1: it must lie in"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"extras": {"reward": ()}}, "extras has ['reward']: add() has arguments of that name"),
        ({"extras": {"x": ((), torch.bfloat16)}}, "the dtype of extras['x'] is torch.bfloat16"),
        ({"action_dtype": torch.bfloat16}, "action_dtype is torch.bfloat16"),
        ({"obs_dtype": torch.bfloat16}, "obs_dtype of 'obs' is torch.bfloat16"),
        ({"obs_shape": {"a": (9, 4, 4)}, "frame_stack": {"b": 3}}, "frame_stack names ['b']"),
        ({"obs_shape": (4, 8, 8, 3), "frame_stack": 4}, "images have three dimensions"),
        ({"obs_shape": {"a": (3,)}, "obs_dtype": {"b": torch.int8}}, "obs_dtype names ['b']"),
    ],
)
def test_constructor_errors(options, message):
    given = {"capacity": 10, "num_envs": 1, "obs_shape": (9, 4, 4), "action_shape": (1,)} | options
    with pytest.raises(ValueError, match=re.escape(message)):
        ReplayBuffer(given.pop("capacity"), **given)


class TestRoom:
    def test_the_representation_says_what_lies_where(self):
        buffer = ReplayBuffer(1000, num_envs=1, obs_shape=(3, 64, 64), action_shape=(1,))
        frames = buffer.state_dict()["tensors"]["frames.obs"]
        frames_bytes = buffer._storage.tensors["frames.obs"].nbytes
        assert frames.shape[1] == 0
        text = f"frames {frames_bytes / 2**20:.1f} MiB on cpu, the rest "
        assert text in repr(buffer)
        assert f"{(buffer.nbytes - frames_bytes) / 2**20:.1f} MiB on cpu)" in repr(buffer)

    def test_what_will_not_fit_is_a_warning_with_what_would(self, monkeypatch):
        monkeypatch.setattr(storage, "_host_memory", lambda: (50 << 10, 100 << 10))
        with pytest.warns(UserWarning, match=r"capacity=1000 .* free: lower the capacity to about \d+"):
            ReplayBuffer(1000, num_envs=1, obs_shape=(3, 8, 8), action_shape=(1,))

    def test_what_cannot_be_allocated_is_an_error_with_what_would(self):
        with pytest.raises(MemoryError, match=r"the host has .* lower the capacity to about \d+"):
            ReplayBuffer(10**10, num_envs=1, obs_shape=(3, 84, 84), action_shape=(1,))

    def test_priorities_count_as_memory(self):
        options = {"num_envs": 1, "obs_shape": (3,), "action_shape": (1,)}
        plain = ReplayBuffer(1000, **options)
        prioritized = ReplayBuffer(1000, sampler="prioritized", **options)
        assert prioritized.nbytes >= plain.nbytes + 1000 * 4


def test_a_batch_moves_to_another_device_and_its_ids_stay():
    driver = make(steps=8)
    batch = driver.buffer.sample(4, augment="shift")
    moved = batch.to("meta")
    for name in ("obs", "next_obs", "action", "reward", "discount", "terminated", "truncated", "weight"):
        assert getattr(moved, name).device.type == "meta", name
        assert getattr(moved, name).shape == getattr(batch, name).shape
    assert moved.extras["prior"].device.type == "meta"
    assert torch.equal(moved.index, batch.index)
    assert torch.equal(moved.obs_offset, batch.obs_offset)
