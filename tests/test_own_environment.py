"""A user's environment by GymEnv and by env.entry_point: how processes find it, and what is said if not."""

import json
import re
import subprocess
import sys
from pathlib import Path

import counting_gymnasium
import gymnasium
import numpy as np
import pytest
import torch
from counting_gymnasium import Counting, ThirdParty, vectors
from gymnasium.spaces import Box
from small_runs import COVR, FLAGS, at_each_step, small_config

from covr_fast import EnvConfig, GymEnv, TrainConfig, Trainer, custom, load_policy, make_env
from covr_fast.checkpoint import load_config
from covr_fast.config import check_types
from covr_fast.entry_point import entry_point_of, load
from covr_fast.errors import UserError
from covr_fast.load_vlm import task_words
from covr_fast.tasks import find_task

DOT = """
import gymnasium
import numpy as np
from gymnasium.spaces import Box
from neighbour import LENGTH

class Dot(gymnasium.Env):
    metadata = {"prompt": "You control a dot.", "action_names": ["left/right"]}
    action_space = Box(-1, 1, (1,))
    observation_space = Box(0, 255, (48, 48, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.count = self.np_random.integers(48), 0
        return self.picture(), {}

    def step(self, action):
        self.at = int(np.clip(self.at + np.round(4 * action[0]), 0, 47))
        self.count += 1
        return self.picture(), self.at / 47, False, self.count == LENGTH, {}

    def picture(self):
        frame = np.zeros((48, 48, 3), np.uint8)
        frame[:, max(0, self.at - 3) : self.at + 4] = 255
        return frame

def several(num_envs):
    return gymnasium.vector.SyncVectorEnv([Dot] * num_envs)

class Broken(Dot):
    def step(self, action):
        if self.count == 3:
            raise ZeroDivisionError("no\\nway")
        return super().step(action)

number = 3
"""
SCRIPT = """
import sys
from covr_fast import GymEnv, TrainConfig, Trainer
from mine import Dot

class Mine(Dot):
    pass

if __name__ == "__main__":
    config = TrainConfig.from_dict({settings!r})
    config.env = GymEnv(make=Mine, num_envs=2, batch_size=2, height=48, width=48, max_episode_steps=6)
    Trainer(config, sys.argv[1]).run()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the user's modules; what is imported from it is forgotten afterwards."""
    (tmp_path / "mine.py").write_text(DOT)
    (tmp_path / "neighbour.py").write_text("LENGTH = 6\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and tmp_path.name in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    monkeypatch.setattr(custom, "REGISTERED", {})


def process(*command, cwd) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=300)


# ---- from the command line -------------------------------------------------------------------------


@pytest.mark.slow
def test_all_commands_find_it_in_processes_of_their_own(tmp_path, folder):
    """As a vector environment; an action is repeated, so its rows get out of step."""
    flags = [flag for flag in FLAGS if not flag.startswith(("--env.action-repeat", "--steps", "--warmup"))]
    chosen = ["--env.entry-point", "mine:several", "--env.action-repeat=4", "--steps=256", "--warmup=128"]
    begun = process(*COVR, "train", "custom", *chosen, "--out", "run", "--save-replay", *flags, cwd=tmp_path)
    assert begun.returncode == 0, begun.stderr
    run = tmp_path / "run"
    assert json.loads((run / "config.json").read_text())["env"]["entry_point"] == "mine:several"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["environment"] == "mine:several"
    assert summary["steps"] == 4 * summary["decisions"]
    assert summary["frames"] < summary["steps"], "no episode ended within a decision"
    assert "You control a dot." in (run / "prompt.txt").read_text()
    for command, said in {
        ("evaluate", "run", "--episodes=2"): r"mine:several: .* over 2 episodes",
        ("evaluate", "run", "--episodes=2", "--vlm-alone", "--round=0"): "VLM alone before any round",
        ("audit", "run", "--rows=8"): r"(?s)version 0, before any round.*│(?!.*transition \d)",
        ("report", "run"): "mine:several",
        ("push", "run", "me/dot", "--dry-run"): "me/dot",
        ("train", "custom", "--resume", "run", "--steps=288"): "from step 256",
        ("bench", "custom", "--env.entry-point=mine:Dot", "--seconds=0.05", *FLAGS): "policy update",
        ("doctor", "custom", "--vlm.model=nano", "--env.entry-point=mine:Dot", *FLAGS): "this machine's CPU",
    }.items():
        done = process(*COVR, *command, cwd=tmp_path)
        assert done.returncode == 0, (command, done.stderr)
        assert re.search(said, " ".join(done.stdout.split())), (command, done.stdout)
    elsewhere = process(*COVR, "evaluate", run, cwd="/")
    assert elsewhere.returncode == 2
    assert "there is no module 'mine' in / or among the installed ones: go to the folder" in elsewhere.stderr
    assert elsewhere.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_class_of_a_script_is_found_by_the_scripts_file(tmp_path, folder):
    settings = small_config(steps=64).to_dict()
    (tmp_path / "script.py").write_text(SCRIPT.replace("{settings!r}", repr(settings)))
    begun = process(sys.executable, "script.py", "run", cwd=tmp_path)
    assert begun.returncode == 0, begun.stderr
    env = json.loads((tmp_path / "run" / "config.json").read_text())["env"]
    assert (env["entry_point"], env["id"]) == (f"{tmp_path}/script.py:Mine", "script:Mine")
    done = process(*COVR, "evaluate", tmp_path / "run", "--episodes=1", cwd="/")
    assert "script:Mine: " in done.stdout, done.stderr


# ---- in a process ----------------------------------------------------------------------------------


def test_it_is_found_again_after_training(tmp_path):
    config = small_config(steps=40)
    config.env = GymEnv(make=Counting, num_envs=4, batch_size=2, height=48, width=48)
    assert (config.env.action_repeat, config.env.id) == (1, "counting_gymnasium:Counting")
    Trainer(config, tmp_path).run()
    env = load_config(tmp_path).env
    assert env.entry_point == "counting_gymnasium:Counting"
    with make_env(env) as envs:
        assert load_policy(tmp_path)(envs.reset()).shape == (4, 1)


def test_a_function_that_cannot_be_imported_is_named_at_once(tmp_path, capsys):
    config = small_config(steps=40)
    config.env = GymEnv(make=lambda: Counting(), num_envs=4, batch_size=2, height=48, width=48)
    assert (config.env.id, config.env.entry_point) == ("test_own_environment:<lambda>", None)
    assert GymEnv(make=lambda: None).id == "test_own_environment:<lambda>-2"
    Trainer(config, tmp_path).run()
    said = " ".join(capsys.readouterr().out.split())
    told = f"another process finds the environment {config.env.id!r} only if it calls register_task("
    assert told in said
    assert said.index(told) < said.index("random:")
    assert load_policy(tmp_path)(np.zeros((1, 9, 48, 48), np.uint8)).shape == (1, 1)
    custom.REGISTERED.clear()  # as in another process
    told = (
        r"unknown environment .*<lambda>', .* your own: name it by env.entry_point, or call .*register_task"
    )
    with pytest.raises(UserError, match=told) as raised:
        load_policy(tmp_path)
    assert "CarRacing" not in str(raised.value)


def test_the_priors_of_rows_that_are_out_of_step_come_at_their_own_decisions(tmp_path):
    config = small_config(steps=360, warmup=72, vlm__every=6)
    config.env = GymEnv(
        make=vectors("NextStep"), num_envs=4, batch_size=4, height=48, width=48, action_repeat=3,
        max_episode_steps=50,
    )  # fmt: skip
    trainer = Trainer(config, tmp_path)
    sizes = []
    at_each_step(trainer, lambda rows: sizes.append(len(rows.env_ids)))
    summary = trainer.run()
    assert min(sizes) < 4, "never out of step"
    assert summary["decisions"] == sum(sizes) == summary["steps"] / 3
    for env in range(4):  # the VLM is asked at every second decision of each environment
        ids = torch.arange(env, 400, 4)
        ids = ids[trainer.buffer.contains(ids)]
        asked = (trainer.buffer.extras(ids)["prior_version"] >= 0).tolist()
        assert len(asked) > 15
        assert asked == [number % 2 == 0 for number in range(len(asked))]


class Silent(gymnasium.Env):
    action_space = Box(-1, 1, (2,))
    observation_space = counting_gymnasium.FRAMES

    def reset(self, *, seed=None, options=None):
        return np.zeros((8, 8, 3), np.uint8), {}


def test_words_come_from_the_settings_else_from_the_environment_else_they_are_neutral():
    neutral = find_task(GymEnv(make=Silent)).words
    assert neutral.action_names == ("number 1", "number 2")
    assert "The task is Silent. Number i drives control i: -1 and 1 are its limits." in neutral.prompt

    class Speaking(Silent):
        metadata = {"prompt": " Push. ", "action_names": ["x", "y"]}  # noqa: RUF012

    def several(num_envs):
        return gymnasium.vector.SyncVectorEnv([Speaking] * num_envs)

    for make in (Speaking, several):
        words = find_task(GymEnv(make=make)).words
        assert (words.prompt, words.action_names) == ("Push.", ("x", "y"))
        words = find_task(GymEnv(make=make, prompt="Pull.", action_names=["a", "b"])).words
        assert (words.prompt, words.action_names) == ("Pull.", ("a", "b"))
    config = TrainConfig(env=GymEnv(make=Silent, prompt="Pull.", action_names=["a", "b"]))
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert find_task(again.env).words == find_task(config.env).words
    assert task_words(again).startswith("Pull.")
    with pytest.raises(UserError, match="1 action_names for 2 numbers in an action"):
        find_task(GymEnv(make=Silent, action_names=["a"]))
    with pytest.raises(UserError, match=r"env.action_names='ab' must be a sequence of texts"):
        GymEnv(make=Silent, action_names="ab")
    with pytest.raises(UserError, match=r"for an environment of your own.*vlm.prompt tells the VLM"):
        find_task(EnvConfig(prompt="Drive."))


def test_it_is_a_setting_like_others():
    from threading import Lock

    class Locked:  # cannot be copied
        def __init__(self):
            self.lock = Lock()

        def __call__(self):
            return Counting()

    config = TrainConfig(env=GymEnv(make=Locked(), num_envs=8))
    config.check()
    check_types(config)
    settings = config.to_dict()
    assert "make" not in settings["env"]
    with make_env(TrainConfig.from_dict(settings).env) as envs:
        assert envs.reset().shape == (8, 9, 84, 84)
    with pytest.raises(UserError, match="GymEnv: make=3 must be a function"):
        GymEnv(make=3)
    with pytest.raises(TypeError, match="id"):
        GymEnv(make=Counting, id="mine")


# ---- entry points ----------------------------------------------------------------------------------


def test_an_entry_point_leads_back_to_its_function(folder):
    for entry_point in (
        "mine:Dot",
        "mine:several",
        f"{folder}/mine.py:Dot",
        "./mine.py:several",
        "mine:Dot.step",
    ):
        make = load(entry_point)
        assert entry_point_of(make) == f"mine:{make.__qualname__}"
        assert load(entry_point) is make
    assert entry_point_of(ThirdParty) == "counting_gymnasium:ThirdParty"
    assert entry_point_of(lambda: None) is None
    assert entry_point_of(vectors("NextStep")) is None
    assert entry_point_of(Counting().step) is None


@pytest.mark.parametrize(
    "entry_point, message",
    [
        ("mine", "must be package.module:name or folder/file.py:name"),
        (":Dot", "must be package.module:name"),
        ("mnie:Dot", r"there is no module 'mnie' in /.* or among the installed ones: go to the folder"),
        ("mine.sub:Dot", "there is no module 'mine.sub' in"),
        ("mine:Dto", "unknown name 'Dto': did you mean Dot"),
        ("mine:number", "is of type int: it must be a function or class"),
        ("lost.py:Dot", "there is no file /.*/lost.py .*edit it in config.json"),
        ("asks.py:Dot", r"raised ModuleNotFoundError: No module named 'nowhere' \(.*asks.py, line 1\)"),
        ("wrong.py:Dot", "importing it raised SyntaxError: "),
        ("json.py:Dot", "has the name of another module, json: give the file another name"),
    ],
)  # fmt: skip
def test_an_entry_point_that_leads_nowhere_is_told_in_one_line(entry_point, message, folder):
    (folder / "asks.py").write_text("import nowhere\n")
    (folder / "wrong.py").write_text("def (\n")
    (folder / "json.py").write_text("")
    with pytest.raises(UserError, match=message) as told:
        make_env(EnvConfig(entry_point=entry_point))
    assert str(told.value).startswith(f"env.entry_point={entry_point!r}")
    assert "\n" not in str(told.value)


def test_a_preset_without_an_environment_asks_for_one():
    with pytest.raises(UserError, match=r"give --env.entry-point package.module:make"):
        find_task(TrainConfig.preset("custom").env)


@pytest.mark.parametrize("make", ["mine:Broken", "mine:broken_together"])
def test_an_environment_that_raises_is_named_with_the_place(make, folder):
    (folder / "mine.py").write_text(
        DOT
        + "def broken_together(num_envs):\n    return gymnasium.vector.SyncVectorEnv([Broken] * num_envs)\n"
    )
    told = rf"environment {make}: its step\(\) raised ZeroDivisionError: no way \(.*mine.py, line 33\)$"
    with make_env(EnvConfig(entry_point=make, num_envs=2, batch_size=2)) as envs:
        envs.reset()
        envs.send(np.zeros((2, 1)), np.arange(2))
        with pytest.raises(UserError, match=told) as raised:
            envs.recv()
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def stepped(make, steps: int = 8) -> None:
    """Plays some steps of two environments."""
    with make_env(GymEnv(make=make, num_envs=2, batch_size=2, max_episode_steps=3)) as envs:
        envs.reset()
        for _ in range(steps):
            envs.send(np.zeros((2, 1)), np.arange(2))
            envs.recv()


@pytest.mark.parametrize("reward", [None, "much", [1.0, 2.0]])
def test_a_reward_that_is_no_number_is_named(reward):
    class Rewarding(Counting):
        def step(self, action):
            observation, _, *rest = super().step(action)
            return observation, reward, *rest

    told = rf"^environment .*Rewarding: its step\(\) returned the reward {re.escape(repr(reward))}: it must"
    with pytest.raises(UserError, match=told):
        stepped(Rewarding)


def test_a_reward_may_be_an_array_of_one_number():
    class Rewarding(Counting):
        def step(self, action):
            observation, reward, *rest = super().step(action)
            return observation, np.array([reward]), *rest

    stepped(Rewarding)


class Narrow(Counting):
    """Its frames are of another shape than its space says, in its first episode or only in later ones."""

    later = False

    def observation(self):
        return super().observation()[:, 1:] if self.episode or not self.later else super().observation()


class NarrowLater(Narrow):
    later = True


@pytest.mark.parametrize("make, who", [(Narrow, r"GymEnv: make\(\)"), (NarrowLater, "environment .*")])
def test_frames_of_another_shape_than_the_space_are_refused(make, who):
    told = rf"^{who}: its observation is uint8 \(8, 7, 3\), and its observation space uint8 \(8, 8, 3\): they"
    with pytest.raises(UserError, match=told):
        stepped(make)


class Unclosable(Counting):
    def close(self):
        raise OSError("it\nhangs")


def unclosable(num_envs):
    class Several(gymnasium.vector.SyncVectorEnv):
        def close_extras(self, **_):
            raise OSError("it hangs")

    return Several([Counting] * num_envs)


@pytest.mark.parametrize("make", [Unclosable, unclosable])
def test_a_run_whose_environments_cannot_be_closed_is_not_lost(make, tmp_path):
    config = small_config(steps=40)
    config.env = GymEnv(make=make, num_envs=4, batch_size=2, height=48, width=48)
    with pytest.warns(RuntimeWarning, match=r"its close\(\) raised OSError: it hangs \(.*, line \d+\)$"):
        summary = Trainer(config, tmp_path).run()
    assert summary["steps"] == 40
    assert (tmp_path / "summary.json").is_file()


def test_the_example_of_the_docs_is_an_entry_point():
    assert load("examples.own_task:Reach").metadata["action_names"] == ["left/right", "down/up"]
    assert Path(sys.modules["examples.own_task"].__file__).parent.name == "examples"
