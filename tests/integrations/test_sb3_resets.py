"""Loops as CleanRL's: which next_obs they add where episodes end; and guesses of the frame stack."""

import warnings

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import FrameStackObservation

pytest.importorskip("stable_baselines3")
from sb3_pixels import Pixels, assert_same, assert_same_arrays, pair_of
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer

from covr_fast.integrations.sb3 import FastReplayBuffer


def rollout(buffers, steps, mode, padding="reset", finals=True):
    """CleanRL's loop. Returns (terminated, between), each bool [steps, 2]: rows whose next_obs is never used,
    and rows that lead from one episode into the next."""

    def make():
        return FrameStackObservation(Pixels((16, 20), discrete=True), 4, padding_type=padding)

    env = SyncVectorEnv([make, make], autoreset_mode=mode)
    obs, _ = env.reset(seed=0)
    terminated, between = np.zeros((2, steps, 2), bool)
    ended = np.zeros(2, bool)
    for i in range(steps):
        action = env.action_space.sample()
        next_obs, reward, terminated[i], truncated, infos = env.step(action)
        between[i] = ended & (mode == AutoresetMode.NEXT_STEP)
        ended = terminated[i] | truncated
        real_next_obs = next_obs.copy()
        if mode == AutoresetMode.SAME_STEP:
            for e in np.flatnonzero(truncated if finals else []):
                real_next_obs[e] = infos["final_obs"][e]
            if not finals:
                between[i] = truncated
        for buffer in buffers:
            buffer.add(obs, real_next_obs, action, reward, terminated[i], infos)
        obs = next_obs
    return terminated, between


def pair(size=200, kind=SB3ReplayBuffer, **options):
    args = size, spaces.Box(0, 255, (4, 16, 20), np.uint8), spaces.Discrete(3), "cpu", 2
    frame_stack = options.pop("frame_stack", "auto")
    theirs = kind(*args, handle_timeout_termination=False, **options)
    ours = FastReplayBuffer(*args, handle_timeout_termination=False, frame_stack=frame_stack, **options)
    return theirs, ours


@pytest.mark.parametrize("frame_stack", ["auto", 4])
def test_the_reset_frame_at_terminations(frame_stack):
    """CleanRL's scripts replace next_obs by the final observation at truncations only."""
    buffers = theirs, ours = pair(frame_stack=frame_stack)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        terminated, _ = rollout(buffers, 60, AutoresetMode.SAME_STEP)
    assert terminated.sum() > 4
    assert ours._stored.stacks["obs"].frames == 4
    assert_same_arrays(theirs, ours, ("observations", "actions", "rewards", "dones"))
    used, expected = np.array(ours.next_observations)[:60], theirs.next_observations[:60]
    np.testing.assert_array_equal(used[~terminated], expected[~terminated])
    # Where it has no use: obs moved on by the newest frame of the next_obs that was added.
    np.testing.assert_array_equal(used[terminated][:, -1], expected[terminated][:, -1])
    np.testing.assert_array_equal(used[terminated][:, :-1], ours.observations[:60][terminated][:, 1:])


@pytest.mark.parametrize("frame_stack", ["auto", 4])
@pytest.mark.parametrize("padding", ["reset", "zero"])
@pytest.mark.parametrize(
    "mode, finals", [(AutoresetMode.NEXT_STEP, True), (AutoresetMode.SAME_STEP, False)], ids=["next", "same"]
)
def test_rows_between_episodes_are_never_drawn(mode, finals, padding, frame_stack):
    """With next-step autoreset they are rows of their own; without final observations, truncated steps."""
    buffers = theirs, ours = pair(frame_stack=frame_stack)
    with pytest.warns(UserWarning, match=r"next-step autoreset.*never drawn.*SAME_STEP") as told:
        terminated, between = rollout(buffers, 60, mode, padding, finals)
    assert len(told) == 1
    assert between.sum() > 4
    assert ours._stored.stacks["obs"].frames == 4
    assert_same_arrays(theirs, ours, ("observations", "actions", "rewards", "dones"))
    good = ~between & ~terminated
    np.testing.assert_array_equal(
        np.array(ours.next_observations)[:60][good], theirs.next_observations[:60][good]
    )
    drawn = ours.sample(2000)
    rewards = theirs.rewards[:60]
    assert set(drawn.rewards.flatten().tolist()) == set(rewards[~between].tolist())


def test_n_step_returns_do_not_reach_across_rows_between_episodes():
    theirs, ours = pair(kind=NStepReplayBuffer, n_steps=3, gamma=0.5)
    with pytest.warns(UserWarning, match="next-step autoreset"):
        terminated, between = rollout((theirs, ours), 60, AutoresetMode.NEXT_STEP)
    # SB3's buffer is told by the timeouts where it must not go on.
    last = np.zeros_like(between)
    last[:-1] = between[1:] & ~terminated[:-1]
    theirs.timeouts[:60] = theirs.dones[:60] = 0
    theirs.dones[:60] = terminated | last
    theirs.timeouts[:60] = last
    np.random.seed(0)  # noqa: NPY002
    positions = np.arange(60).repeat(4)
    for e in range(2):
        keep = positions[~between[positions, e]]
        at = np.full(len(keep), e)
        expected = _at(theirs, keep, at)
        got = ours._samples(ours.buffer.ids_at(at, keep), None)
        unused = expected.dones[:, 0] == 1
        got.next_observations[unused] = expected.next_observations[unused]
        assert_same(expected, got)


def _at(buffer, positions, envs):
    """SB3's rows at these positions of these environments."""
    choose, np.random.randint = np.random.randint, lambda *args, **options: envs
    try:
        return buffer._get_samples(positions)
    finally:
        np.random.randint = choose


def test_warnings_as_errors_leave_nothing_half_written():
    ours = pair()[1]
    rollout([ours], 3, AutoresetMode.NEXT_STEP)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = np.zeros((2, 4, 16, 20), np.uint8)
        rest = np.zeros(2, int), np.ones(2), np.zeros(2), {}
        with pytest.raises(UserWarning, match="never drawn"):
            ours.add(ours.next_observations[2], first, *rest)
    assert (ours.pos, len(ours.buffer)) == (3, 6)
    ours.add(first, first, *rest)
    assert (ours.pos, len(ours.buffer)) == (4, 8)


def test_memory_of_such_loops_is_that_of_frames():
    for mode in AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP:
        ours = pair(20_000)[1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rollout([ours], 60, mode)
        assert ours.buffer.nbytes < 1.3 * 20_000 * 16 * 20


def test_a_buffer_of_such_rows_alone_says_that_there_is_nothing():
    ours = pair(2, frame_stack=4)[1]
    *frames, first = pictures(6, 1, 16, 20)
    stacks = *stacks_of(frames, 4), first[None].repeat(4, axis=1)
    obs, later, first = (stack.repeat(2, axis=0) for stack in stacks)
    rest = np.zeros(2, int), np.zeros(2), np.zeros(2), {}
    ours.add(obs, later, *rest)
    with pytest.warns(UserWarning, match="never drawn"):
        ours.add(later, first, *rest)
    with pytest.raises(IndexError, match="no row is a transition"):
        ours.sample(3)


def stacks_of(frames, n):
    return [np.concatenate(frames[i : i + n])[None] for i in range(len(frames) - n + 1)]


def pictures(*shape):
    return list(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def one(shape, *, size=60, dtype=np.uint8, **options):
    theirs = pair_of(size, spaces.Box(0, 255, shape, dtype), spaces.Discrete(3))[0]
    return theirs, FastReplayBuffer(size, theirs.observation_space, theirs.action_space, "cpu", 1, **options)


def assert_same_rows(theirs, ours, n):
    assert_same(theirs._get_samples(np.arange(n)), ours._get_samples(np.arange(n)))


def feed(buffers, stacks, done=lambda i: False):
    for i in range(len(stacks) - 1):
        for buffer in buffers:
            buffer.add(stacks[i], stacks[i + 1], np.zeros(1, int), np.array([i]), np.array([done(i)]), [{}])


@pytest.mark.filterwarnings("ignore:frame_stack of 'obs' was taken for 12 and is now 4")
def test_a_still_picture_does_not_decide_the_stack():
    """Everything slides while nothing moves; the guess is mended without losing what was stored."""
    frames = [np.full((3, 16, 16), 7, np.uint8)] * 8 + pictures(30, 3, 16, 16)
    buffers = theirs, ours = one((12, 16, 16))
    feed(buffers, stacks_of(frames, 4)[:30], lambda i: i == 6)
    assert ours._stored.stacks["obs"].frames == 4
    assert_same_rows(theirs, ours, 29)


@pytest.mark.filterwarnings("ignore:frame_stack of 'obs' was taken for 12 and is now 4")
def test_a_picture_that_stood_still_until_the_ring_was_full():
    """The guess is mended late, and every position still has the transition that SB3 has there."""
    stacks = stacks_of([np.full((3, 16, 16), 7, np.uint8)] * 34 + pictures(25, 3, 16, 16), 4)
    buffers = theirs, ours = one((12, 16, 16), size=20)
    feed(buffers, stacks[:21])
    for i in range(20, len(stacks) - 1):
        feed(buffers, stacks[i : i + 2])
        assert_same_rows(theirs, ours, 20)
    assert ours._stored.stacks["obs"].frames == 4


def test_a_guess_that_drops_names_it_and_its_cost():
    """A picture that stood still and is no stack at all."""
    still = [np.full((1, 3, 16, 16), 7, np.uint8)] * 5
    buffers = theirs, ours = one((3, 16, 16))
    with pytest.warns(UserWarning, match="taken for 3") as told:
        feed(buffers, still + pictures(20, 1, 3, 16, 16))
    (message,) = (str(warning.message) for warning in told)
    assert "frame_stack of 'obs' was taken for 3 and is now 1" in message
    assert "MiB instead of 0.0 MiB" in message
    assert (
        "pass frame_stack=3 (in replay_buffer_kwargs), and such rows are refused; if 1, pass that" in message
    )
    assert told[0].filename == __file__
    assert_same_rows(theirs, ours, 24)


def test_repeated_frames_prove_no_stack():
    """A grey picture in three channels looks like the first stack of an episode on every step."""
    moving = [np.repeat(picture, 3, axis=1) for picture in pictures(20, 1, 1, 16, 16)]
    still = [np.full((1, 3, 16, 16), 7, np.uint8)] * 5
    buffers = theirs, ours = one((3, 16, 16))
    with pytest.warns(UserWarning, match="taken for 3 and is now 1"):
        feed(buffers, still + moving, lambda i: i == 2)
    assert_same_rows(theirs, ours, 24)


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("frames", [4, 1], ids=["four frames", "one repeated"])
def test_a_declared_stack_is_refused_where_it_does_not_slide(steps, frames):
    """Without steps before it nothing shows that repeated frames begin an episode."""
    stacks = stacks_of(pictures(9, 1, 16, 16), 4)
    _, ours = one((4, 16, 16), frame_stack=4)
    feed([ours], stacks[: steps + 1])
    next_obs = 255 - np.stack(pictures(1, frames, 16, 16)).repeat(4 // frames, axis=1)
    if (steps, frames) == (5, 1):
        with pytest.warns(UserWarning, match="never drawn"):
            feed([ours], [stacks[steps], next_obs])
        return
    with pytest.raises(ValueError, match="Frame stacks must slide"):
        feed([ours], [stacks[steps], next_obs])
    assert (ours.pos, ours.size()) == (steps, steps)


def test_a_row_that_is_refused_says_nothing_about_the_stack():
    """Neither the first row nor a later one."""
    theirs, ours = one((4, 16, 16))
    stacks = stacks_of(pictures(9, 1, 16, 16), 4)
    still = np.zeros((1, 4, 16, 16), np.uint8)
    for _ in range(2):
        with pytest.raises(ValueError, match="reward is NaN"):
            ours.add(still, stacks[0], np.zeros(1, int), np.array([np.nan]), np.zeros(1), [{}])
        feed((theirs, ours), stacks)
        assert ours._stored.stacks["obs"].frames == 4
        assert_same_rows(theirs, ours, ours.pos)


def test_a_first_step_that_terminates_decides_nothing():
    """Other environments tell the stack; their next_obs must slide."""
    stacks = np.stack([np.concatenate(stacks_of(f, 4)) for f in pictures(2, 9, 1, 16, 20)], axis=1)
    ours = pair()[1]
    next_obs = stacks[1].copy()
    next_obs[0] = next_obs[0, :1]  # the reset of environment 0
    ours.add(stacks[0], next_obs, np.zeros(2, int), np.zeros(2), np.array([1, 0]), {})
    assert ours._stored.stacks["obs"].frames == 4


def test_first_steps_that_all_terminate_say_that_the_guess_is_one():
    _, ours = one((4, 16, 16))
    with pytest.warns(UserWarning, match=r"taken for 1: all first steps terminated.*pass frame_stack="):
        feed([ours], pictures(2, 1, 4, 16, 16), lambda i: True)


def test_channels_last_stacks():
    stacks = [stack.transpose(0, 2, 3, 1) for stack in stacks_of(pictures(20, 1, 16, 20), 4)]
    buffers = theirs, ours = one((16, 20, 4))
    feed(buffers, stacks[:8])
    reset = np.repeat(np.stack(pictures(1, 16, 20, 1)), 4, axis=3)
    feed(buffers, [stacks[8], reset], lambda i: True)
    feed(buffers, stacks[9:])
    assert ours._stored.stacks["obs"].frames == 4
    rows = np.delete(np.arange(15), 7)
    assert_same(theirs._get_samples(rows), ours._get_samples(rows))
    np.testing.assert_array_equal(ours.next_observations[7, 0, ..., :-1], stacks[8][0, ..., 1:])


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32, np.float64])
@pytest.mark.parametrize(
    "frame, axis", [((16, 20), 0), ((16, 20), -1), ((16, 20, 3), 0)], ids=["first", "last", "apart"]
)
def test_pictures_of_every_type_and_layout(dtype, frame, axis):
    """Apart: gymnasium stacks colour frames along an axis of their own."""
    frames = np.random.default_rng(0).integers(0, 256, (20, *frame)).astype(dtype)
    stacks = [np.moveaxis(frames[i : i + 4], 0, axis)[None] for i in range(17)]
    buffers = theirs, ours = one(stacks[0].shape[1:], dtype=dtype)
    feed(buffers, stacks, lambda i: i % 7 == 6)
    assert ours._stored.stacks["obs"].frames == 4
    assert_same_rows(theirs, ours, 16)
    np.testing.assert_array_equal(ours.observations, theirs.observations)


def test_a_still_picture_of_more_channels_than_a_stack_has_frames():
    buffers = theirs, ours = one((66, 70, 70))
    feed(buffers, [np.zeros((1, 66, 70, 70), np.uint8)] * 4)
    assert ours._stored.stacks["obs"].frames == 33
    assert_same_rows(theirs, ours, 3)


@pytest.mark.parametrize(
    "in_dict, wrong, message",
    [
        (True, {"camra": 4}, "camra"),
        (False, {"obs": 4}, "pass an integer"),
        *((in_dict, wrong, repr(wrong)) for in_dict in (True, False) for wrong in ("Auto", 0)),
    ],
)
def test_frame_stacks_that_cannot_be_meant(in_dict, wrong, message):
    box = spaces.Box(0, 255, (4, 16, 16), np.uint8)
    space = spaces.Dict({"camera": box}) if in_dict else box
    with pytest.raises(ValueError, match=rf"frame_stack.*{message}"):
        FastReplayBuffer(10, space, spaces.Discrete(3), "cpu", 1, frame_stack=wrong)


def test_float_stacks_that_differ_by_rounding_are_stacks():
    _, buffer = one((4, 8, 8), dtype=np.float32)
    frames = np.random.default_rng(0).uniform(0.1, 1, (15, 8, 8)).astype(np.float32)
    for t in range(10):
        again = frames[t + 1 : t + 5] * np.float32(1 + 2e-7)  # normalised once more
        zero = np.zeros(1)
        buffer.add(frames[None, t : t + 4], again[None], np.zeros((1, 1)), zero, zero, [{}])
        frames[t + 1 : t + 5] = again
    assert buffer._stored.stacks["obs"].frames == 4
    assert buffer.buffer.jumps == 0
