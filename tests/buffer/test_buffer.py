"""ReplayBuffer against an oracle that stores everything."""

import re

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
        expected = []
        for i, e in enumerate(ids):
            row = (
                {"obs": obs[i]},
                action[i],
                float(reward[i]),
                {"obs": next_obs[i]},
                terminated[i],
                truncated[i],
            )
            expected.append(self.oracle.add(e, Step(*row, extras={"prior": prior[i]})))
        assert index.tolist() == expected
        return index

    def check(self, batch_size: int = 64) -> None:
        batch = self.buffer.sample(batch_size, dtype=torch.uint8)
        self.check_batch(batch)

    def check_batch(self, batch) -> None:
        assert self.buffer.contains(batch.index).all()
        indices = batch.index.tolist()
        steps = [self.oracle.step(index) for index in indices]
        reward, next_obs, discount, terminated, truncated = zip(
            *map(self.oracle.n_step_row, indices), strict=True
        )
        expected_obs = np.stack([channels_first(step.obs["obs"], self.envs[0]) for step in steps])
        expected_next = np.stack(
            [channels_first(observation["obs"], self.envs[0]) for observation in next_obs]
        )
        np.testing.assert_array_equal(batch.obs.numpy(), expected_obs)
        np.testing.assert_array_equal(batch.next_obs.numpy(), expected_next)
        np.testing.assert_array_equal(batch.action.numpy(), [step.action for step in steps])
        np.testing.assert_array_equal(batch.extras["prior"].numpy(), [step.extras["prior"] for step in steps])
        np.testing.assert_allclose(batch.reward.numpy(), reward, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(batch.discount.numpy(), discount, rtol=1e-6)
        assert batch.terminated.tolist() == list(terminated)
        assert batch.truncated.tolist() == list(truncated)


def channels_first(obs: np.ndarray, env: StackedEnv) -> np.ndarray:
    return obs.transpose(2, 0, 1) if env.channels_last else obs


def make(
    capacity: int = 50,
    num_envs: int = 3,
    stack: int = 3,
    frame: tuple[int, ...] = (2, 7, 5),
    padding: str = "repeat",
    max_length: int = 10,
    channels_last: bool = False,
    seed: int = 0,
    **options,
) -> Driver:
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
    return Driver(buffer, envs, seed)


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


def test_channels_last_input_is_sampled_channels_first():
    driver = make(frame=(7, 5, 2), channels_last=True)
    for _ in range(60):
        driver.add()
    driver.check()


def test_channels_last_memory_holds_the_same_pixels():
    driver = make(frame=(3, 7, 5))
    for _ in range(30):
        driver.add()
    batch = driver.buffer.sample(32, dtype=torch.uint8, memory_format=torch.channels_last)
    assert batch.obs.is_contiguous(memory_format=torch.channels_last)
    driver.check_batch(batch)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16, torch.uint16])
def test_channels_last_memory_of_images_of_other_types(dtype, device):
    shape = (6, 5, 4)
    buffer = ReplayBuffer(
        50,
        num_envs=1,
        obs_shape=shape,
        action_shape=(),
        frame_stack=3,
        obs_dtype=dtype,
        device=device,
        seed=0,
    )
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
    driver = make(capacity=3000, frame=(3, 16, 9))
    for _ in range(1000):
        driver.add()
    batch = driver.buffer.sample(512, dtype=dtype)
    pixels = driver.buffer.observations(batch.index)
    assert len(pixels.unique()) == 255  # every byte that StackedEnv draws
    torch.testing.assert_close(batch.obs, (pixels.float() / 255).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [8, 700])  # below and above the size that is written past the cache
def test_shift_is_an_edge_clamped_window(dtype, batch_size):
    driver = make(frame=(3, 20, 18), capacity=300)
    for _ in range(100):
        driver.add()
    batch = driver.buffer.sample(batch_size, augment="shift", pad=4, dtype=dtype)
    assert batch.obs_offset.min() == 0 or batch_size < 100
    assert batch.obs_offset.max() == 8 or batch_size < 100
    assert not torch.equal(batch.obs_offset, batch.next_obs_offset)
    for got, offset, truth in [
        (batch.obs, batch.obs_offset, [driver.oracle.step(i).obs["obs"] for i in batch.index.tolist()]),
        (
            batch.next_obs,
            batch.next_obs_offset,
            [driver.oracle.n_step_row(i)[1]["obs"] for i in batch.index.tolist()],
        ),
    ]:
        for i, picture in enumerate(truth):
            y, x = offset[i].tolist()
            window = np.pad(picture, ((0, 0), (4, 4), (4, 4)), mode="edge")[:, y : y + 20, x : x + 18]
            expected = torch.from_numpy(window)
            expected = expected if dtype == torch.uint8 else (expected.float() / 255).to(dtype)
            torch.testing.assert_close(got[i], expected, rtol=0, atol=0)


def test_shift_wider_than_the_picture():
    driver = make(frame=(1, 3, 2))
    for _ in range(20):
        driver.add()
    batch = driver.buffer.sample(64, augment="shift", pad=5, dtype=torch.uint8)
    for i, index in enumerate(batch.index.tolist()):
        y, x = batch.obs_offset[i].tolist()
        picture = np.pad(driver.oracle.step(index).obs["obs"], ((0, 0), (5, 5), (5, 5)), mode="edge")
        np.testing.assert_array_equal(batch.obs[i].numpy(), picture[:, y : y + 3, x : x + 2])


def test_crop_is_the_window_at_the_offset():
    driver = make(frame=(3, 20, 18))
    for _ in range(30):
        driver.add()
    batch = driver.buffer.sample(64, augment="crop", pad=4, dtype=torch.uint8)
    assert batch.obs.shape == batch.next_obs.shape == (64, 9, 12, 10)
    for i, index in enumerate(batch.index.tolist()):
        y, x = batch.obs_offset[i].tolist()
        expected = driver.oracle.step(index).obs["obs"][:, y : y + 12, x : x + 10]
        np.testing.assert_array_equal(batch.obs[i].numpy(), expected)


def test_batches_keep_their_memory_while_anyone_looks():
    driver = make(capacity=300, frame=(3, 32, 32))
    for _ in range(100):
        driver.add()
    view = driver.buffer.sample(64, dtype=torch.uint8).obs[5:9, :3]  # all that is left of its batch
    before = view.clone()
    held = [driver.buffer.sample(64, dtype=torch.uint8) for _ in range(20)]
    assert torch.equal(view, before)
    for batch in held:
        driver.check_batch(batch)
    del held, batch
    addresses = {driver.buffer.sample(64, dtype=torch.uint8).obs.data_ptr() for _ in range(20)}
    assert len(addresses) <= 2  # one batch's memory, over and over


def test_a_seed_and_its_batch_number_decide_the_batch():
    a, b, other = make(), make(), make(seed=1)
    for driver in (a, b, other):
        for _ in range(30):
            driver.add()
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
    driver = make(num_envs=1, capacity=20, n_step=5, max_length=10**6)
    for _ in range(4):
        driver.add()
    with pytest.raises(IndexError, match="nothing to sample"):
        driver.buffer.sample(1)
    driver.add()
    assert driver.buffer.sample(50).index.unique().tolist() == [0]


def test_a_cut_ends_the_segment_and_bootstraps():
    driver = make(num_envs=2, n_step=3, max_length=10**6)
    for _ in range(10):
        driver.add()
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
    def stacks(self, n=12):
        frames = np.random.default_rng(0).integers(0, 256, (n + 3, 1, 3, 30, 30), dtype=np.uint8)
        return [np.concatenate(frames[i : i + 3], axis=1) for i in range(n)]

    def add(self, buffer, obs, next_obs, terminated=False):
        no = np.zeros(1, bool)
        return buffer.add(obs, np.zeros((1, 1)), np.zeros(1), next_obs, no | terminated, no)

    def add_all(self, buffer, steps):
        for obs, next_obs in steps:
            self.add(buffer, obs, next_obs)

    def buffer(self):
        return ReplayBuffer(50, num_envs=1, obs_shape=(9, 30, 30), action_shape=(1,), frame_stack=3)

    def test_next_obs_of_the_following_episode(self):
        buffer, stacks = self.buffer(), self.stacks()
        for i in range(5):
            self.add(buffer, stacks[i], stacks[i + 1])
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
        for i in range(5):
            self.add(buffer, stacks[i], stacks[i + 1])
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
        frames = np.random.default_rng(0).integers(0, 256, (60, 1, 3, 84, 84), dtype=np.uint8)
        stacks = [np.concatenate(frames[t : t + 3], axis=1) for t in range(57)]
        buffer = ReplayBuffer(50, num_envs=1, obs_shape=(9, 84, 84), action_shape=(1,), frame_stack=3)
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
    good = {
        "action": np.zeros((2, 2)),
        "reward": np.zeros(2),
        "terminated": np.zeros(2, bool),
        "truncated": np.zeros(2, bool),
    }
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
    with pytest.raises(ValueError, match="1 rows for 2 environments: pass env_ids"):
        add(
            obs[:1],
            np.zeros((1, 2)),
            np.zeros(1),
            obs[:1],
            np.zeros(1, bool),
            np.zeros(1, bool),
            prior=prior[:1],
        )
    assert len(driver.buffer) == 0


def test_single_transitions_by_id():
    driver = make(capacity=30, num_envs=2)
    for _ in range(40):
        index = driver.add()
    buffer, oracle = driver.buffer, driver.oracle
    held = torch.arange(25 * 2, 40 * 2)
    assert buffer.contains(held).all()
    assert not buffer.contains([25 * 2 - 1, 40 * 2, -1]).any()
    for i, got in zip(held.tolist(), buffer.observations(held), strict=True):
        np.testing.assert_array_equal(got, oracle.step(i).obs["obs"])
    for i, got in zip(held.tolist(), buffer.frames(held), strict=True):
        np.testing.assert_array_equal(got, oracle.step(i).obs["obs"][-2:])
    for i, got in zip(held.tolist(), buffer.actions(held), strict=True):
        np.testing.assert_array_equal(got, oracle.step(i).action)
    buffer.set_extras(index, prior=torch.full((2, 3), 7.0))
    assert (buffer.extras(index)["prior"] == 7).all()
    for i, got in zip(held[:-2].tolist(), buffer.extras(held[:-2])["prior"], strict=True):
        np.testing.assert_array_equal(got, oracle.step(i).extras["prior"])
    for call in (buffer.observations, buffer.frames, buffer.actions, buffer.extras):
        with pytest.raises(IndexError, match="overwritten"):
            call([25 * 2 - 1])
    with pytest.raises(IndexError, match="overwritten"):
        buffer.set_extras([0], prior=torch.zeros(1, 3))


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
    buffer = ReplayBuffer(
        30,
        num_envs=1,
        obs_shape=(5 * stack,),
        obs_dtype=torch.float64,
        action_shape=(1,),
        frame_stack=stack,
        seed=0,
    )
    rows = []
    for _ in range(100):
        obs, next_obs, *ends = env.step()
        rows.append((obs, next_obs))
        buffer.add(
            obs[None], np.zeros((1, 1)), np.zeros(1), next_obs[None], *(np.array([end]) for end in ends)
        )
    batch = buffer.sample(64)
    for i, index in enumerate(batch.index.tolist()):
        np.testing.assert_array_equal(batch.obs[i], rows[index][0])
        np.testing.assert_array_equal(batch.next_obs[i], rows[index][1])


def test_memory_is_about_one_frame_per_transition():
    buffer = ReplayBuffer(
        8000,
        num_envs=8,
        obs_shape=(9, 84, 84),
        action_shape=(6,),
        frame_stack=3,
        extras={"prior": (6,), "mask": ()},
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
        ({"gamma": 1.5}, "gamma is 1.5"),
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


@pytest.mark.parametrize(
    "options, message",
    [
        ({"capacity": 1e3}, "capacity is 1000.0: it must be an integer"),
        ({"obs_shape": 3}, "obs_shape of 'obs' is 3: it must be a tuple"),
        ({"action_shape": 3}, "action_shape is 3: it must be a tuple"),
        ({"extras": {"prior": 3}}, "extras['prior'] is 3: it must be a tuple"),
    ],
)
def test_constructor_type_errors(options, message):
    given = {"capacity": 10, "num_envs": 1, "obs_shape": (3,), "action_shape": (1,)} | options
    with pytest.raises(TypeError, match=re.escape(message)):
        ReplayBuffer(given.pop("capacity"), **given)


class TestDtypesOfRows:
    def rows(self, **changed):
        zero, no = np.zeros((2, 3), np.float32), np.zeros(2, bool)
        rows = {"obs": zero, "action": np.zeros(2), "reward": np.zeros(2), "next_obs": zero}
        return rows | {"terminated": no, "truncated": no} | changed

    def buffer(self, **options):
        return ReplayBuffer(20, num_envs=2, obs_shape=(3,), action_shape=(), seed=0, **options)

    @pytest.mark.parametrize("name", ["obs", "action", "reward", "next_obs"])
    def test_bfloat16_as_autocast_gives_it(self, name):
        rows = self.rows()
        rows[name] = torch.full(rows[name].shape, 1.5, dtype=torch.bfloat16)
        buffer = self.buffer()
        assert (getattr(buffer.get(buffer.add(**rows)), name) == 1.5).all()

    def test_bfloat16_priorities(self):
        buffer = self.buffer(sampler="prioritized")
        buffer.update_priorities(buffer.add(**self.rows()), torch.ones(2, dtype=torch.bfloat16))

    def test_fractions_are_not_rounded_to_integers(self):
        half = np.full((2, 3), 0.5, np.float32)
        with pytest.raises(
            ValueError,
            match="action has dtype float64: it must be int64",
        ):
            self.buffer(action_dtype=torch.int64).add(**self.rows(action=np.full(2, 0.5)))
        with pytest.raises(ValueError, match="obs has dtype float32: it must be int64"):
            self.buffer(obs_dtype=torch.int64).add(**self.rows(obs=half, next_obs=half))
        buffer = self.buffer(extras={"tokens": ((), torch.int32)})
        index = buffer.add(**self.rows(), tokens=[1, 2])
        with pytest.raises(
            ValueError, match=r"tokens has dtype float64: it must be int32; cast it, or .* extras\['tokens'\]"
        ):
            buffer.set_extras(index, tokens=[0.5, 0.5])

    def test_a_mask_is_no_list_of_ids(self):
        buffer, mask = self.buffer(), np.array([True, False])
        with pytest.raises(ValueError, match=r"env_ids has dtype bool.*np\.flatnonzero"):
            buffer.add(**self.rows(), env_ids=mask)
        with pytest.raises(ValueError, match="env_ids has dtype bool"):
            buffer.cut(mask)
        index = buffer.add(**self.rows())
        with pytest.raises(ValueError, match="index has dtype bool"):
            buffer.get(torch.from_numpy(mask))
        assert len(buffer.get(index[mask]).index) == 1
        assert len(buffer.get([]).index) == 0

    def test_extras_of_the_wrong_shape(self):
        buffer = self.buffer(extras={"prior": (2,)})
        index = buffer.add(**self.rows(), prior=np.zeros((2, 2)))
        with pytest.raises(ValueError, match=r"prior has shape \(2, 3\): it must be \(2, 2\)"):
            buffer.set_extras(index, prior=np.zeros((2, 3)))


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
        plain, prioritized = (
            ReplayBuffer(1000, **options),
            ReplayBuffer(1000, sampler="prioritized", **options),
        )
        assert prioritized.nbytes >= plain.nbytes + 1000 * 4


@pytest.mark.parametrize("what", ["reward", "action", "obs", "next_obs"])
def test_a_value_that_is_not_finite_is_refused_and_nothing_is_added(what):
    buffer = ReplayBuffer(20, num_envs=2, obs_shape=(3,), action_shape=(1,))
    rows = {
        "obs": np.zeros((2, 3), np.float32),
        "action": np.zeros((2, 1), np.float32),
        "reward": np.zeros(2, np.float32),
        "next_obs": np.zeros((2, 3), np.float32),
        "terminated": np.zeros(2, bool),
        "truncated": np.zeros(2, bool),
    }
    rows[what][1] = np.nan
    with pytest.raises(ValueError, match=rf"{what} is NaN or infinite in rows \[1\]"):
        buffer.add(**rows)
    assert len(buffer) == 0


def test_a_batch_moves_to_another_device_and_its_ids_stay():
    driver = make()
    for _ in range(8):
        driver.add()
    batch = driver.buffer.sample(4, augment="shift")
    moved = batch.to("meta")
    for name in ("obs", "next_obs", "action", "reward", "discount", "terminated", "truncated", "weight"):
        assert getattr(moved, name).device.type == "meta", name
        assert getattr(moved, name).shape == getattr(batch, name).shape
    assert moved.extras["prior"].device.type == "meta"
    assert torch.equal(moved.index, batch.index)
    assert torch.equal(moved.obs_offset, batch.obs_offset)
