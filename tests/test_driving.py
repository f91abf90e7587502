"""The driving tasks: their numbers, words, rewards and ends, by stepping the simulator."""

import re
from typing import Any

import numpy as np
import pytest

from covr_fast import EnvConfig, make_env, tasks
from covr_fast.driving import DRIVES, FASTER, IDLE, LANE_LEFT, LANE_RIGHT, SLOWER, five_actions
from covr_fast.envs import PixelEnvs, Rows
from covr_fast.errors import UserError
from covr_fast.opengl import import_envpool
from covr_fast.words import words_for

TRACKS = ["racetrack-v0", "racetrack-large-v0"]


def simulator(env_id: str, num_envs: int, **options: Any) -> Any:
    """EnvPool's own environment, after its reset."""
    env = import_envpool().make_gymnasium(env_id, num_envs=num_envs, num_threads=1, seed=5, **options)
    env.reset()
    return env


def cars(env: Any) -> list[Any]:
    """The driver's car in each environment, with x, y (down in the picture), heading (clockwise), speed."""
    return [state.vehicles[0] for state in env.debug_states()]


def config(env_id: str, **settings: Any) -> EnvConfig:
    return EnvConfig(id=env_id, **{"num_envs": 2, "batch_size": 2, "action_repeat": 1, **settings})


def step(envs: PixelEnvs, *action: float) -> Rows:
    (ids,) = envs.batches()
    envs.send(np.tile(action, (len(ids), 1)), ids)
    return envs.recv()


# ---- the highway's two numbers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "steer, pedal, expected",
    [
        (-1, 0, LANE_LEFT), (1, 0, LANE_RIGHT), (0, -1, SLOWER), (0, 1, FASTER), (0, 0, IDLE),
        (0.33, -0.33, IDLE), (-0.34, 0, LANE_LEFT), (0.34, 0.33, LANE_RIGHT), (0.33, 0.34, FASTER),
        (0.8, -0.9, SLOWER), (-0.9, 0.8, LANE_LEFT), (0.5, 0.5, LANE_RIGHT), (-0.5, -0.5, LANE_LEFT),
    ],
)  # fmt: skip
def test_the_number_farther_from_zero_decides(steer, pedal, expected):
    action = five_actions(np.array([[steer, pedal], [0.0, 0.0]]))
    assert action.tolist() == [expected, IDLE]
    assert action.dtype == np.int32


def test_each_number_does_what_the_words_say():
    prompt = words_for("highway-v0", 2).prompt
    assert "-1 is left (up), 1 is right (down)" in prompt
    assert "-1 is slower, 1 is faster" in prompt
    env = simulator("highway-v0", 5, initial_lane_id=1)
    before = cars(env)
    actions = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]], np.float32)
    env.step(
        five_actions(actions).astype(np.float32), np.arange(5, dtype=np.int32)
    )  # as PixelEnvs sends them
    after = cars(env)
    lanes = [now.target_lane_index - then.lane_index for now, then in zip(after, before, strict=True)]
    assert lanes == [0, -1, 1, 0, 0]
    assert after[1].y < after[0].y - 1
    assert after[2].y > after[0].y + 1
    assert after[3].speed < after[0].speed - 1
    assert after[4].speed > after[0].speed + 1
    assert [car.target_speed for car in after[3:]] == [20, 30]


def test_speed_and_the_right_lane_are_paid_and_a_crash_ends_the_episode():
    prompt = words_for("highway-v0", 2).prompt
    assert "Drive fast, hit no other car, and prefer the lower lanes" in prompt
    with make_env(config("highway-v0", num_envs=16, batch_size=16, max_episode_steps=40)) as envs:
        envs.reset()
        rows = [step(envs, 0, 1) for _ in range(40)]
    ends = np.stack([r.terminated for r in rows])
    reward = np.stack([r.reward for r in rows])
    assert ends.any(0).mean() > 0.5, "full speed without looking does not crash"
    assert reward[ends].max() < 0.5
    assert reward[~ends].min() > 0.6
    by_lane = []
    for lane in range(4):
        env = simulator("highway-v0", 1, vehicles_count=0, initial_lane_id=lane)
        _, paid, *_ = env.step(np.full(1, IDLE, np.float32), np.zeros(1, np.int32))
        by_lane.append((cars(env)[0].y, paid[0]))
    assert by_lane == sorted(by_lane), "a lane further down pays less"
    assert len({paid for _, paid in by_lane}) == 4


# ---- the racetracks --------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", TRACKS)
def test_1_steers_to_the_right_and_the_speed_is_constant(env_id):
    prompt = words_for(env_id, 1).prompt
    assert "-1 is fully left, 1 is fully right, as the driver sees it" in prompt
    assert "its speed is constant" in prompt
    env = simulator(env_id, 3)
    for _ in range(3):
        env.step(np.array([[-0.5], [0], [0.5]], np.float32), np.arange(3, dtype=np.int32))
    left, straight, right = cars(env)
    assert left.heading < straight.heading - 0.3 < right.heading - 0.6
    assert left.y < straight.y - 1 < right.y - 2
    assert {car.speed for car in (left, straight, right)} == {10}


def test_the_picture_shows_the_turn_about_the_car_at_its_centre():
    assert "at the centre of the picture, its lights are at its front" in words_for("racetrack-v0", 1).prompt
    with make_env(config("racetrack-v0", height=112, width=112, frame_stack=1)) as envs:
        envs.reset()
        (ids,) = envs.batches()
        for _ in range(2):
            envs.send(np.array([[-0.4], [0.4]]), ids)
            frames = envs.recv().next_obs.astype(int)
    for frame, turned in zip(frames, (-1, 1), strict=True):
        yellow = (frame[2] < 50) & (frame[0] > 150)
        y, x = np.nonzero(yellow)
        assert abs(y.mean() - 56) < 4
        assert abs(x.mean() - 56) < 4
        lights_y, lights_x = np.nonzero(yellow & (frame[0] > 230))
        assert lights_x.mean() > x.mean() + 8
        assert (lights_y.mean() - y.mean()) * turned > 2


def test_the_middle_of_a_lane_is_paid_and_steering_costs():
    prompt = words_for("racetrack-v0", 1).prompt
    assert "in the middle of a lane, and steer no more than you need to" in prompt
    with make_env(config("racetrack-v0")) as envs:
        envs.reset()
        (ids,) = envs.batches()
        envs.send(np.array([[0.0], [0.2]]), ids)
        straight, steered = envs.recv().reward
    assert straight == pytest.approx(1)
    assert steered < 1 - 0.15 * 0.2


@pytest.mark.parametrize("env_id", TRACKS)
def test_off_the_road_the_episode_ends_unpaid(env_id):
    with make_env(config(env_id)) as envs:
        envs.reset()
        rows = [step(envs, -1) for _ in range(4)]
    ended = int(np.argmax([r.terminated[0] for r in rows]))
    assert rows[ended].terminated.all()
    assert (rows[ended].reward == 0).all()
    assert (rows[ended - 1].reward > 0).all()


def test_what_the_page_says_of_the_racetracks_roads():
    """docs/environments.md: one car, always the same start, and only racetrack-v0 is a closed course."""
    for env_id in TRACKS:
        states = simulator(env_id, 2).debug_states()
        assert [len(state.vehicles) for state in states] == [1, 1]
        assert states[0].vehicles[0].x == states[1].vehicles[0].x
        pieces = {(getattr(lane, "from"), lane.to) for lane in states[0].road_lanes}
        assert ({begin for begin, _ in pieces} == {end for _, end in pieces}) == (env_id == "racetrack-v0")
    assert len(simulator("highway-v0", 1).debug_states()[0].vehicles) == 51


# ---- episodes and pictures -------------------------------------------------------------------------


@pytest.mark.parametrize("env_id, action, steps", [("racetrack-v0", (0,), 5), ("highway-v0", (0, -1), 2)])
def test_an_episode_is_truncated_after_max_episode_steps(env_id, action, steps):
    with make_env(config(env_id, max_episode_steps=steps)) as envs:
        envs.reset()
        rows = [step(envs, *action) for _ in range(2 * steps)]
    assert [r.truncated.all() for r in rows] == ([False] * (steps - 1) + [True]) * 2
    assert not any(r.terminated.any() for r in rows)
    assert sum(r.frames for r in rows) == 2 * 2 * steps


def test_a_racetrack_episode_lasts_whole_seconds():
    with pytest.raises(UserError, match=r"max_episode_steps=7: .* choose a multiple of 5"):
        make_env(config("racetrack-v0", max_episode_steps=7))


@pytest.mark.parametrize("env_id", DRIVES)
def test_the_pictures_need_no_opengl(env_id, monkeypatch):
    def no_opengl() -> None:
        raise AssertionError("OpenGL was asked for")

    monkeypatch.setattr(tasks, "require_frames", no_opengl)
    with make_env(config(env_id, height=42, width=126)) as envs:
        first = envs.reset()
        assert first.shape == (2, 9, 42, 126)
        rows = step(envs, *([0.0] * envs.action_shape[0]))
    assert (rows.next_obs[:, -3:] != first[:, -3:]).any((1, 2, 3)).all()


def test_the_highway_s_picture_has_the_car_where_the_words_say():
    assert "a third of the picture from its left side, and halfway up" in words_for("highway-v0", 2).prompt
    with make_env(config("highway-v0", height=84, width=252, frame_stack=1)) as envs:
        frames = envs.reset().astype(int)
    for frame in frames:
        y, x = np.nonzero((frame[1] > 150) & (frame[2] < 50))
        assert abs(x.mean() / 252 - 1 / 3) < 0.05
        assert abs(y.mean() / 84 - 1 / 2) < 0.05
        others = frame[2] - frame[0] > 100
        assert others.any(), "no other car in the picture"


@pytest.mark.parametrize("env_id", DRIVES)
def test_the_words_are_its_own(env_id):
    words = words_for(env_id, DRIVES[env_id].action_dim)
    assert len(words.action_names) == DRIVES[env_id].action_dim
    assert not re.search(r"The task is|actuator", words.prompt)
