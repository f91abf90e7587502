"""Which runs are found, which belong together, and what is said of the others."""

import json
import shutil

import pytest
from written_runs import write_run

from covr_fast import TrainConfig
from covr_fast.errors import UserError
from covr_fast.methods import METHODS
from covr_fast.reporting.command import command
from covr_fast.reporting.groups import differing, read_study


def labels(study):
    return [
        (task.title, group.label, [run.seed for run in group.runs])
        for task in study.tasks
        for group in task.groups
    ]


def change(run, **parts):
    """Changes settings in config.json."""
    settings = json.loads((run / "config.json").read_text())
    for part, values in parts.items():
        settings[part] = settings[part] | values if isinstance(values, dict) else values
    (run / "config.json").write_text(json.dumps(settings))


def test_runs_that_differ_in_the_seed_are_a_group(tmp_path):
    for seed in (1, 0):
        write_run(tmp_path / f"sweep/a{seed}", 10, seed=seed)
        write_run(tmp_path / f"sweep/b{seed}", 10, seed=seed, agent__prior_weight=0.0)
        write_run(tmp_path / f"sweep/c{seed}", 10, seed=seed, method="off")
    study = read_study([tmp_path / "sweep"])
    assert labels(study) == [
        ("racetrack", "fast · covr, agent.prior_weight=0.025", [0, 1]),
        ("racetrack", "fast · covr, agent.prior_weight=0.0", [0, 1]),
        ("racetrack", "fast · off", [0, 1]),
    ]
    (task,) = study.tasks
    assert differing(task.groups) == ["agent.prior_weight", "covr.vlm"]
    assert [task.base(group) and task.base(group).label for group in task.groups] == ["fast · off"] * 2 + [
        None
    ]


def test_what_changes_no_result_makes_no_group(tmp_path):
    write_run(tmp_path / "a", 10)
    write_run(
        tmp_path / "b", 10, seed=1, threads=2, device="cuda:1", log_every=7, eval__every=500, begun_as=""
    )
    study = read_study([tmp_path])
    assert labels(study) == [("racetrack", "fast · covr", [0, 1])]


def test_agents_and_tasks_are_apart(tmp_path):
    write_run(tmp_path / "1", 10, preset="cartpole-swingup", kind="rad")
    write_run(tmp_path / "2", 10, preset="cartpole-swingup", kind="sac")
    write_run(tmp_path / "3", 10, preset="carracing")
    write_run(tmp_path / "4", 10, preset="carracing-full")
    write_run(tmp_path / "5", 10, preset="cartpole-swingup", method="vbe", steps=0)
    assert labels(read_study([tmp_path])) == [
        ("cartpole-swingup", "rad · covr", [0]),
        ("cartpole-swingup", "sac · covr", [0]),
        ("cartpole-swingup", "vbe", [0]),
        ("carracing, episodes of 400 steps", "fast · covr", [0]),
        ("carracing-full, episodes of 1000 steps", "fast · covr", [0]),
    ]


def test_names_are_sorted_as_people_count(tmp_path):
    for name in ("m10", "m2", "m1"):
        write_run(tmp_path / name, 10, method=name)
    assert [label for _, label, _ in labels(read_study([tmp_path]))] == [
        "fast · m1",
        "fast · m2",
        "fast · m10",
    ]


def test_a_seed_counts_once(tmp_path):
    first = write_run(tmp_path / "first", 10)
    second = write_run(tmp_path / "second", 11)
    with pytest.raises(UserError) as error:
        read_study([first, second])
    assert str(first) in str(error.value)
    assert str(second) in str(error.value)
    (tmp_path / "link").symlink_to(first)
    study = read_study([first, first, tmp_path / "link", tmp_path / "second/../first"])
    assert len(study.runs) == 1


def test_folders_of_models_in_a_run_are_no_runs(tmp_path):
    run = write_run(tmp_path / "run", 10)
    (run / "checkpoint/vlm").mkdir(parents=True)
    (run / "checkpoint/vlm/config.json").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "qwen"}')
    assert [run.folder for run in read_study([tmp_path]).runs] == [run]


def test_unfinished_and_broken_runs_are_named_and_left_out(tmp_path):
    whole = write_run(tmp_path / "whole", 10)
    unfinished = write_run(tmp_path / "unfinished", 10, seed=1)
    (unfinished / "summary.json").unlink()
    torn = write_run(tmp_path / "torn", 10, seed=2)
    (torn / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    other = write_run(tmp_path / "other", 10, seed=3)
    (other / "summary.json").write_text('{"evaluations": {"actor": 3}}')
    endless = write_run(tmp_path / "endless", float("nan"), seed=4)
    study = read_study([tmp_path])
    assert [run.folder for run in study.runs] == [whole]
    assert [run.folder for run in study.unfinished] == [unfinished]
    problems = {broken.folder: broken.problem for broken in study.broken}
    assert set(problems) == {torn, other, endless}
    assert "is damaged in line 2" in problems[torn]
    assert "TypeError" in problems[other]
    assert "not finite" in problems[endless]


def test_a_run_of_an_older_version(tmp_path):
    """Without method, kind, preset, new settings, and parts of the summary."""
    old = write_run(tmp_path / "old", 10)
    settings = json.loads((old / "config.json").read_text())
    for name in ("method", "begun_as"):
        settings.pop(name, None)
    for name in ("kind", "encoder_tau"):
        del settings["agent"][name]
    del settings["covr"]["confidence"]
    (old / "config.json").write_text(json.dumps(settings))
    summary = json.loads((old / "summary.json").read_text())
    del summary["decisions"], summary["time_shares"]
    (old / "summary.json").write_text(json.dumps(summary))
    write_run(tmp_path / "new", 10, seed=1)
    study = read_study([tmp_path])
    assert labels(study) == [("racetrack", "fast · covr", [0, 1])]
    (run,) = (run for run in study.runs if run.folder == old)
    assert run.lacks == ["decisions in summary.json", "time_shares in summary.json"]


def test_a_run_without_settings_is_a_group_of_its_own(tmp_path):
    write_run(tmp_path / "a", 10)
    bare = write_run(tmp_path / "b", 10)
    (bare / "config.json").unlink()
    study = read_study([tmp_path])
    assert [(task.env_id, group.label) for task in study.tasks for group in task.groups] == [
        ("racetrack-v0", "fast · covr"),
        ("racetrack-v0", "- · covr"),
    ]
    assert study.runs[1].lacks == ["config.json"]


@pytest.mark.parametrize(
    "prepare, message",
    [
        (lambda path: None, "there is no such folder"),
        (lambda path: path.mkdir(), "holds no run"),
        (lambda path: (write_run(path, 1) / "summary.json").write_text("{"), "summary.json is damaged"),
    ],
)
def test_nothing_to_report(prepare, message, tmp_path):
    prepare(tmp_path / "runs")
    with pytest.raises(UserError, match=message) as error:
        read_study([tmp_path / "runs"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["covr", "dpl", "m3"])
def test_the_command_makes_the_same_settings(method, tmp_path, monkeypatch):
    """What it says is parsed by the command line itself."""
    import shlex

    from small_runs import call

    made = {"seed": 4, "steps": 900, "agent__channels": [8, 8], "agent__strides": [2, 2], "vlm__graph": False,
            "covr__confidence": True, "covr__horizon": None, "vlm__prompt": "Drive, please."}  # fmt: skip
    run = write_run(tmp_path / "run", 10, **made)
    config = TrainConfig.from_dict(json.loads((run / "config.json").read_text()))
    METHODS[method].change(config)
    config.method = method
    settings = json.loads(json.dumps(config.to_dict()))
    (run / "config.json").write_text(json.dumps(settings))
    (study_run,) = read_study([run]).runs
    words = shlex.split(command(study_run))
    assert words[:3] == ["covr-fast", "train", "racetrack"]
    configs = []
    monkeypatch.setattr("covr_fast.trainer.Trainer", lambda config, *_, **__: configs.append(config) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(monkeypatch, *words[1:], "--out", str(tmp_path / "out"))
    assert json.loads(json.dumps(configs[0].to_dict())) == settings


def test_a_preset_that_is_not_known_has_no_command(tmp_path):
    write_run(tmp_path / "a", 10, begun_as="a-preset-of-mine")
    (run,) = read_study([tmp_path]).runs
    assert command(run) is None


def test_copies_of_one_run_are_told(tmp_path):
    run = write_run(tmp_path / "a", 10)
    shutil.copytree(run, tmp_path / "b")
    with pytest.raises(UserError, match="a seed counts once"):
        read_study([tmp_path])
