"""A user's own Gymnasium environment as a task; and CARLA's tasks without CARLA."""

import re
import sys
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from small_runs import FLAGS

import covr_fast
from covr_fast import EnvConfig, cli, custom, make_env, register_task, tasks
from covr_fast.errors import UserError
from covr_fast.tasks import find_task

FRAMES = Box(0, 255, (10, 14, 3), np.uint8)
ACTIONS = Box(np.array([0.0, -3.9]), np.array([10.0, 0.1]), dtype=np.float64)
"""0.1 in float32 is larger than in float64: rounding may lead out of the box."""


class Own(gymnasium.Env):
    """Its picture tells its number, its episode and its step. Episodes last `length` steps."""

    made: ClassVar[list["Own"]] = []

    def __init__(self, *, actions=ACTIONS, observations=FRAMES, render_mode=None, length=5):
        self.action_space, self.observation_space, self.render_mode = actions, observations, render_mode
        self.length, self.episode, self.step_in_episode = length, -1, 0
        self.seeds: list[int | None] = []
        self.actions: list[np.ndarray] = []
        self.closed = False
        self.made.append(self)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.episode, self.step_in_episode = self.episode + 1, 0
        return self._observation(), {}

    def step(self, action):
        assert not self.closed
        assert self.action_space.contains(action)
        assert self.step_in_episode < self.length, "a step after the end"
        self.actions.append(action)
        self.step_in_episode += 1
        over = self.step_in_episode == self.length
        return self._observation(), np.float64(self.step_in_episode), over, False, {}

    def render(self):
        frame = np.zeros(FRAMES.shape, np.uint8)
        frame[:] = 100 * (self.seeds[0] or 0) % 256, self.episode, self.step_in_episode
        return frame

    def close(self):
        self.closed = True

    def _observation(self):
        return self.render() if self.observation_space is FRAMES else np.zeros(2, np.float32)


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    monkeypatch.setattr(custom, "REGISTERED", {})
    monkeypatch.setattr(tasks, "REGISTERED", custom.REGISTERED)
    monkeypatch.setattr(Own, "made", [])


def register(make=Own, name="own", prompt="You control a dot. 1 is up.", action_names=("x", "y")) -> None:
    register_task(name, make, prompt, action_names)


RENDERED = {"observations": Box(-1, 1, (2,), np.float32), "render_mode": "rgb_array"}
IN_A_DICT = {"observations": Dict({"state": Box(-1, 1, (2,))}), "render_mode": "rgb_array"}


@pytest.mark.parametrize("kind", [{}, RENDERED, IN_A_DICT], ids=["observed", "rendered", "in a dict"])
def test_its_episodes_follow_the_contract(kind):
    register(lambda: Own(**kind))
    looked_at = Own.made.pop()
    assert looked_at.closed
    config = EnvConfig(
        id="own", num_envs=4, batch_size=2, height=10, width=14, frame_stack=2, action_repeat=2, seed=7
    )
    with make_env(config) as envs:
        assert envs.action_shape == (2,)
        obs = envs.reset()
        assert obs.shape == (4, 6, 10, 14)
        for ids in envs.batches():
            envs.send(np.zeros((2, 2)), ids)
        for decision in range(6):
            for first in (0, 2):
                rows = envs.recv()
                assert rows.env_ids.tolist() == [first, first + 1]
                episode, k = divmod(decision, 3)
                last = k == 2
                # Two steps a decision; the fifth is the last of its episode.
                assert rows.reward.tolist() == [(3, 7, 5)[k]] * 2
                assert rows.terminated.tolist() == [last] * 2
                assert not rows.truncated.any()
                assert (rows.next_obs[:, 4:, 0, 0] == [episode, (2, 4, 5)[k]]).all()
                after = [episode + 1, 0] if last else [episode, (2, 4)[k]]
                assert (rows.obs[:, 4:, 0, 0] == after).all()
                if last:
                    assert (rows.obs[:, 1:3, 0, 0] == after).all(), "the stack of the last episode goes on"
                envs.send(np.zeros((2, 2)), rows.env_ids)
    assert [env.seeds[:3] for env in Own.made] == [[7 + i, None, None] for i in range(4)]
    assert all(env.closed for env in Own.made)


def test_actions_are_scaled_to_its_bounds():
    register()
    with make_env(EnvConfig(id="own", num_envs=1, batch_size=1, action_repeat=1)) as envs:
        envs.reset()
        for action in ([-1, -1], [1, 1], [0, 0.5], [-9, 9]):
            envs.send(np.array([action]), np.array([0]))
            envs.recv()
    assert np.allclose(Own.made[-1].actions, [[0, -3.9], [10, 0.1], [5, -0.9], [0, 0.1]])
    assert Own.made[-1].actions[0].dtype == np.float64


def test_long_episodes_are_truncated():
    register(lambda: Own(length=100))
    config = EnvConfig(id="own", num_envs=1, batch_size=1, action_repeat=4, max_episode_steps=6)
    with make_env(config) as envs:
        envs.reset()
        for truncated, frames in ((False, 4), (True, 2), (False, 4), (True, 2)):
            envs.send(np.zeros((1, 2)), np.array([0]))
            rows = envs.recv()
            assert (rows.truncated.item(), rows.frames, rows.terminated.item()) == (truncated, frames, False)


@pytest.mark.slow
def test_the_command_line_trains_resumes_and_evaluates_with_it(tmp_path, capsys, monkeypatch):
    register(lambda: Own(length=8), prompt="You control a dot.")
    run = str(tmp_path / "run")
    assert (
        cli.run(["train", "carracing", "--env.id=own", "--out", run, "--save-replay", "--no-video", *FLAGS])
        == 0
    )
    assert (
        (tmp_path / "run/prompt.txt")
        .read_text()
        .startswith("<|im_start|>userYou control a dot. The picture is")
    )
    assert cli.run(["train", "carracing", "--resume", run, "--steps=72"]) == 0
    assert cli.run(["evaluate", run, "--episodes=2"]) == 0
    assert re.search("own: .* over 2 episodes", capsys.readouterr().out)
    custom.REGISTERED.clear()
    with pytest.raises(UserError, match=r"unknown environment env.id 'own'.*register_task first"):
        cli.run(["evaluate", run])


def test_frames_are_resized():
    register()
    with make_env(EnvConfig(id="own", num_envs=1, batch_size=1, height=20, width=30, grayscale=True)) as envs:
        assert envs.reset().shape == (1, 3, 20, 30)


def test_an_environment_is_used_by_one_thread():
    import threading

    class Local(Own):
        def __init__(self):
            super().__init__(**RENDERED)
            self.thread = threading.get_ident()

        def step(self, action):
            assert threading.get_ident() == self.thread
            return super().step(action)

        def render(self):
            assert threading.get_ident() == self.thread
            return super().render()

        def close(self):
            assert threading.get_ident() == self.thread
            super().close()

    register(Local)
    with make_env(EnvConfig(id="own", num_envs=4, batch_size=1)) as envs:
        envs.reset()
        for ids in envs.batches():
            envs.send(np.zeros((1, 2)), ids)
        for _ in envs.batches():
            envs.recv()
    assert len({env.thread for env in Own.made}) == 5


def test_its_own_error_reaches_the_user_and_nothing_stays_open():
    def make():
        if len(Own.made) == 3:
            raise RuntimeError("the port is taken")
        return Own()

    register(make)
    told = r"environment own: make\(\) raised RuntimeError: the port is taken \(.*test_tasks.py, line \d+\)"
    with pytest.raises(UserError, match=told):
        make_env(EnvConfig(id="own", num_envs=4, batch_size=4))
    assert [env.closed for env in Own.made] == [True] * 3


def test_the_vlm_is_told_its_words():
    register(prompt=" You control a dot.\n")
    words = find_task(EnvConfig(id="own")).words
    assert (words.prompt, words.action_names) == ("You control a dot.", ("x", "y"))


class Chw(Own):
    def __init__(self):
        super().__init__(observations=Box(0, 255, (3, 10, 14), np.uint8))


class FloatFrames(Own):
    def __init__(self):
        super().__init__(**RENDERED)

    def render(self):
        return super().render() / 255


class OldReset(Own):
    def reset(self, **options):
        return super().reset(**options)[0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "CheetahRun-v1"}, "name='CheetahRun-v1' is taken: choose another"),
        ({"name": ""}, "name='' must be text"),
        ({"prompt": None}, "prompt=None must be text"),
        ({"make": Own()}, "make=.* must be a function that makes one gymnasium.Env"),
        ({"make": lambda: None}, "make.. makes a NoneType: it must make one gymnasium.Env"),
        ({"make": lambda: gymnasium.make_vec("Pendulum-v1", 2)}, "makes a SyncVectorEnv"),
        ({"action_names": ("x",)}, "1 action_names for 2 numbers in an action: give one name per number"),
        ({"action_names": "xy"}, "action_names='xy' must be a sequence of texts"),
        ({"make": lambda: Own(actions=Discrete(3))}, r"actions Discrete\(3\): .*give it a Box of floats"),
        ({"make": lambda: Own(actions=MultiDiscrete([2, 2]))}, "continuous: give it a Box of floats"),
        ({"make": lambda: Own(actions=Box(0, 5, (2,), np.int64))}, "continuous: give it a Box of floats"),
        ({"make": lambda: Own(actions=Box(-1, np.inf, (2,)))}, "give its Box finite low and high"),
        ({"make": lambda: Own(actions=Box(-1, 1, (2, 2)))}, r"give it a Box of shape \[A\]"),
        ({"make": lambda: Own(observations=Box(-1, 1, (2,)))}, "render_mode is None: give it uint8"),
        ({"make": lambda: Own(observations=IN_A_DICT["observations"])}, "frames: its observations are Dict"),
        ({"make": Chw}, r"without frames: .*\(3, 10, 14\).*: give it uint8 observations \[H, W, 3\]"),
        ({"make": OldReset}, r"reset\(\) returns a ndarray: it must return observation, info"),
        ({"make": FloatFrames}, r"render\(\) is float64 \(10, 14, 3\): it must be a numpy uint8 \[H, W, 3\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_at_once(change, message):
    with pytest.raises(UserError, match=message):
        register(**change)
    assert not custom.REGISTERED
    assert all(env.closed for env in Own.made if env is not change.get("make"))


def test_a_name_is_registered_once():
    register()
    with pytest.raises(UserError, match="name='own' is taken"):
        register()


def test_one_environment_for_all_is_refused():
    only = Own()
    register(lambda: only)
    with pytest.raises(UserError, match="makes the same environment twice: it must make a new one"):
        make_env(EnvConfig(id="own", num_envs=2, batch_size=2))


def test_an_unknown_id_says_how_to_register():
    register(name="my-robot")
    with pytest.raises(UserError, match=r"did you mean my-robot.*register_task first, in every process"):
        make_env(EnvConfig(id="my-robt"))


def test_it_needs_no_envpool(monkeypatch):
    def missing():
        raise UserError("envpool is not installed: pip install 'covr-fast[train]'")

    monkeypatch.setattr(tasks, "import_envpool", missing)
    register()
    with make_env(EnvConfig(id="own", num_envs=1, batch_size=1)) as envs:
        envs.reset()


def test_it_is_a_public_name():
    assert covr_fast.register_task is register_task


# ---- CARLA -----------------------------------------------------------------------------------------


def test_without_carlas_client_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "carla", None)
    with pytest.raises(
        UserError, match=r"CARLA's client is missing \(.*\): pip install 'covr-fast\[carla\]'"
    ):
        make_env(EnvConfig(id="carla-highway", num_envs=1, batch_size=1))


def test_carlas_names_are_taken():
    with pytest.raises(UserError, match="name='carla-highway' is taken"):
        register(name="carla-highway")
