"""Specs of sweeps: what they ask for, and what is refused."""

import re
from pathlib import Path

import pytest

from covr_fast import TrainConfig
from covr_fast.errors import UserError
from covr_fast.files import full_names
from covr_fast.sweeps.processes import command
from covr_fast.sweeps.spec import PlannedRun, read_spec, shipped_specs
from covr_fast.sweeps.states import SweepRun


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


GRID = """
summary = "A grid"
presets = ["racetrack", "highway"]
agents = ["sac", "rad"]
methods = ["off", "dpl"]
seeds = [3, 5]
"""


def test_a_grid_of_presets_agents_methods_and_seeds(tmp_path):
    spec = read_spec(written(tmp_path, GRID))
    assert (spec.name, spec.summary, len(spec.runs)) == ("mine", "A grid", 16)
    assert spec.groups == ["sac-off", "sac-dpl", "rad-off", "rad-dpl"]
    first, last = spec.runs[0], spec.runs[-1]
    assert str(first.place) == "racetrack/sac-off/seed-3"
    assert str(last.place) == "highway/rad-dpl/seed-5"
    config = last.config
    assert (config.begun_as, config.agent.kind, config.method, config.seed) == ("highway", "rad", "dpl", 5)
    assert (config.covr.vlm, config.covr.cold_start) == ("frozen", 0)


def test_arguments_go_before_the_spec(tmp_path):
    path = written(tmp_path, GRID + "[settings]\nsteps = 9_000\n")
    spec = read_spec(path, seeds=1, presets=["carracing"], only=["rad-dpl"], model="nano", steps=16_000)
    (run,) = spec.runs
    assert str(run.place) == "carracing/rad-dpl/seed-0"
    assert (run.config.steps, run.config.vlm.model) == (16_000, "nano")


GROUPS = """
presets = ["walker-walk", "cheetah-run"]
model = "someone/vlm"
[settings]
covr.cold_start = 3
replay.batch_size = 64
tuner.epochs = 2
agent.channels = [8, 8]
agent.strides = [2, 2]
[groups.a]
agent = "rad"
settings.replay = { batch_size = 32 }
by_preset.walker-walk.replay.batch_size = 16
[groups.b]
method = "dpl"
"""


def test_settings_of_all_of_a_group_and_of_a_preset_in_it(tmp_path):
    runs = {str(run.place): run.config for run in read_spec(written(tmp_path, GROUPS)).runs}
    assert {name: config.replay.batch_size for name, config in runs.items()} == {
        "walker-walk/a/seed-0": 16,
        "walker-walk/b/seed-0": 64,
        "cheetah-run/a/seed-0": 32,
        "cheetah-run/b/seed-0": 64,
    }
    for config in runs.values():
        assert config.vlm.model == "someone/vlm"
        assert config.tuner.epochs == 2
        assert config.agent.channels == (8, 8)
    assert runs["cheetah-run/a/seed-0"].covr.cold_start == 3
    assert runs["cheetah-run/b/seed-0"].covr.cold_start == 0, "a setting of all groups undid the method"


ONE = "presets = ['racetrack']\n"


@pytest.mark.parametrize(
    "text, said",
    [
        (
            "presets = ['racetrak']\n[groups.a]",
            "racetrak, group a: unknown preset 'racetrak': did you mean racetrack",
        ),
        ("preset = ['racetrack']\n[groups.a]", "unknown entry 'preset': did you mean presets"),
        ("presets = 'racetrack'\n[groups.a]", "presets='racetrack' must be a list of names"),
        ("presets = ['racetrack']", "give either groups, or agents and methods"),
        (
            "presets = ['racetrack']\nagents = ['rad']\n[groups.a]",
            "give either groups, or agents and methods",
        ),
        (
            "presets = ['racetrack']\n[groups.a]\nagents = 'rad'",
            "entry of the group a: 'agents': did you mean agent",
        ),
        (
            "presets = ['racetrack']\n[groups.a]\nagent = 'rod'",
            "unknown kind of agent 'rod': did you mean rad",
        ),
        (ONE + "[groups.a]\nmethod = 'dlp'", "unknown method 'dlp': did you mean dpl"),
        (
            ONE + "[groups.a]\nsettings.replay.batchsize = 4",
            "unknown setting 'replay.batchsize': did you mean replay.batch_size",
        ),
        (ONE + "[settings]\nstep = 4\n[groups.a]", "unknown setting 'step': did you mean"),
        (ONE + "[settings]\nseed = 4\n[groups.a]", "seed does not belong into settings"),
        (ONE + "[settings]\nsteps = 'x'\n[groups.a]", "group a: steps='x' must be a whole number"),
        (ONE + "[settings]\nagent.channels = 16\n[groups.a]", "agent.channels=16 must be a list of whole"),
        (
            ONE + "[settings]\nagent.channels = [1.5]\n[groups.a]",
            "agent.channels=[1.5] must be a list of whole",
        ),
        (
            ONE + "[settings]\nenv.action_names = 'x'\n[groups.a]",
            "env.action_names='x' must be a list of texts",
        ),
        (ONE + "[settings]\ntuner.max_steps = 'x'\n[groups.a]", "tuner.max_steps='x' must be a whole number"),
        (ONE + "[settings]\ntuner.epochs = 'x'\n[groups.a]", "tuner.epochs='x' must be a whole number"),
        (ONE + "[settings]\nvideo = 'yes'\n[groups.a]", "video='yes' must be true or false"),
        (ONE + "[settings]\ntuner.mode = 3\n[groups.a]", "tuner.mode=3 must be 'lora' or 'full'"),
        (ONE + "[settings]\ntuner.epochs = 0\n[groups.a]", "epochs must be at least 1"),
        ("presets = ['racetrack', 'racetrack']\n[groups.a]", "two runs have the name racetrack/a/seed-0"),
        (ONE + "[groups.a]\n[groups.A]", "two runs have the name racetrack/a/seed-0"),
        (ONE + "seeds = [1, 1]\n[groups.a]", "two runs have the name racetrack/a/seed-1"),
        (ONE + "methods = ['m1', 'm1']", "methods has 'm1' twice: name it once"),
        (ONE + "agents = ['sac', 'rad', 'sac']", "agents has 'sac' twice: name it once"),
        (ONE + "[groups.a]\n[groups.a]", "is no TOML"),
        (ONE + "seeds = 0\n[groups.a]", "seeds=0 must be their number"),
        (ONE + "seeds = [-1]\n[groups.a]", "must be their number"),
        (ONE + "model = 3\n[groups.a]", "model=3 must be the name of a VLM"),
        (ONE + "[groups.a]\nagent = 3", "agent=3 of the group a must be a name"),
        (ONE + "[groups.a]\nmethod = ['off']", "method=['off'] of the group a must be a name"),
        (ONE + "[groups.a]\nby_preset = 3", "by_preset of the group a must have a table for each preset"),
        (ONE + "[groups.'a/b']", "cannot name a folder"),
        (ONE + "[groups.a]\nby_preset.highwy.steps = 5", "did you mean highway"),
        (
            ONE + "[groups.a]\nby_preset.highway.steps = 5",
            "by_preset of the group a is about highway, which is not among the presets (racetrack): add it",
        ),
        (
            ONE + "[groups.a]\nby_preset.highway.stepps = 5",
            "unknown setting 'stepps': did you mean steps",
        ),
        ("presets = ['racetrack'", "is no TOML"),
    ],
)
def test_what_a_spec_cannot_ask_for(text, said, tmp_path):
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        read_spec(written(tmp_path, text))
    assert "mine.toml" in str(raised.value)
    assert "\n" not in str(raised.value) or "TOML" in said


def test_groups_and_presets_that_do_not_run_are_checked_too(tmp_path):
    text = "presets = ['racetrack', 'highway']\n[groups.a]\nby_preset.highway.steps = 5_000\n[groups.b]\n"
    path = written(tmp_path, text)
    (run,) = read_spec(path, presets=["racetrack"], only=["a"]).runs
    assert run.config.steps != 5_000
    (run,) = read_spec(path, presets=["highway"], only=["a"]).runs
    assert run.config.steps == 5_000
    path = written(tmp_path, text + "settings.stepps = 3")
    with pytest.raises(UserError, match="unknown setting 'stepps': did you mean steps"):
        read_spec(path, only=["a"])


ELSEWHERE = {"begun_as", "seed", "agent.kind", "vlm.model", "method"}
"""They do not belong into settings."""


@pytest.mark.parametrize("name", sorted(full_names(TrainConfig().to_dict()).keys() - ELSEWHERE))
def test_every_setting_says_in_words_what_it_takes(name, tmp_path):
    path = written(tmp_path, f"presets = ['racetrack']\n[settings]\n{name} = [2026-01-01]\n[groups.a]\n")
    with pytest.raises(UserError, match=f"{re.escape(name)}=.* must be ") as raised:
        read_spec(path)
    assert not re.search(r"\b(int|str|float|bool|None|tuple)\b", str(raised.value).rpartition(" must be ")[2])


def test_what_train_refuses_a_sweep_refuses(tmp_path, monkeypatch):
    def refuse(config) -> None:
        if config.method == "off" and config.covr.vlm != "off":
            raise UserError("method='off' and covr.vlm='tuned'")

    monkeypatch.setattr(TrainConfig, "check", refuse)
    text = "presets = ['racetrack']\n[groups.a]\nmethod = 'off'\n"
    read_spec(written(tmp_path, text))
    with pytest.raises(UserError, match="racetrack, group a: method='off' and covr"):
        read_spec(written(tmp_path, text + "settings.covr.vlm = 'tuned'"))


def test_specs_that_do_not_exist():
    with pytest.raises(UserError, match="unknown sweep 'racetrak': did you mean racetrack"):
        read_spec("racetrak")
    with pytest.raises(UserError, match=r"none\.toml does not exist"):
        read_spec("none.toml")


SHIPPED = [run for name in shipped_specs() for run in read_spec(name, seeds=1).runs]


def test_every_row_of_the_papers_tables_has_a_group():
    assert {
        "sac",
        "sac-covr",
        "deepmdp",
        "deepmdp-covr",
        "rad",
        "rad-covr",
        "drq",
        "vbe",
        "dpl",
        "apl",
        "vpf",
    } < set(read_spec("dmcontrol").groups)
    assert read_spec("ablations").groups == ["covr", *(f"m{i}" for i in range(1, 12))]
    assert {"sac", "drq", "covr", "vbe", "dpl", "apl", "vpf"} == set(read_spec("carla-highway").groups)
    assert {"sac", "drq", "covr"} == set(read_spec("carla-pedestrians").groups)
    assert {run.preset for run in read_spec("dmcontrol-hard").runs} == {
        "hopper-hop", "walker-run", "pendulum-swingup",
    }  # fmt: skip


class Parsed(Exception):
    """Carries what a Trainer would have been given."""


def parsed(arguments: list[str], monkeypatch) -> TrainConfig:
    def caught(config, *_, **__):
        raise Parsed(config)

    monkeypatch.setattr("covr_fast.trainer.Trainer", caught)
    from covr_fast.commands import train

    with pytest.raises(Parsed) as raised:
        train.main(arguments)
    return raised.value.args[0]


@pytest.mark.parametrize("run", SHIPPED, ids=lambda run: f"{run.preset}-{run.group}")
def test_the_command_of_a_run_gives_the_settings_of_its_spec(run: PlannedRun, monkeypatch, tmp_path, capsys):
    name, *arguments = command(SweepRun(run, tmp_path / "run"))[4:]
    config = parsed([name, *arguments], monkeypatch)
    assert full_names(config.to_dict()) == full_names(run.config.to_dict())


def test_switches_and_lists_as_flags(monkeypatch, tmp_path, capsys):
    text = """
presets = ["racetrack"]
[settings]
video = false
env.grayscale = false
vlm.motion = false
eval.rounds = true
vlm.prompt = "Drive = well, please"
agent.channels = [8, 8]
agent.strides = [2, 2]
tuner.learning_rate = 1e-5
[groups.a]
"""
    (run,) = read_spec(written(tmp_path, text)).runs
    config = parsed(command(SweepRun(run, tmp_path / "run"), threads=1)[4:], monkeypatch)
    assert config.threads == 1
    config.threads = 0
    assert full_names(config.to_dict()) == full_names(run.config.to_dict())


def test_a_model_in_a_folder_is_the_same_from_everywhere(monkeypatch, tmp_path):
    (tmp_path / "vlm").mkdir()
    monkeypatch.chdir(tmp_path)
    (run,) = read_spec(written(tmp_path, "presets = ['racetrack']\n[groups.a]"), model="vlm").runs
    assert run.config.vlm.model == str(tmp_path / "vlm")
