import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
from small_runs import COVR, FLAGS, TRAIN, call

from covr_fast import TrainConfig, cli
from covr_fast.commands import common
from covr_fast.evaluate import Evaluation


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A whole run through the real command, with its output going to a file as in CI."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    done = subprocess.run([*TRAIN, "--out", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_train_prints_a_summary_without_control_characters(run_folder):
    _, stdout = run_folder
    policies = ("random policy", "VLM alone, before", "VLM alone, after", "actor alone")
    for text in ("episode returns", *policies, "tau", "steps/s", "wall time: "):
        assert text in stdout
    assert "\x1b" not in stdout
    assert "\r" not in stdout


def test_train_leaves_a_video_and_curves(run_folder):
    out, _ = run_folder
    import imageio.v3 as iio

    assert iio.imread(out / "curves.png").std() > 0
    clip = iio.imread(next(out.glob("episode.*")))
    assert clip.shape[0] == 6  # 24 frames, 4 a decision
    assert clip.std() > 10


@pytest.mark.parametrize("signals", [["SIGTERM"], ["SIGHUP"], ["SIGHUP", "SIGHUP"]])
def test_a_job_that_is_ended_is_saved_and_continues(signals, tmp_path):
    """Also where SIGINT is ignored, as in a shell's background jobs; a dropped terminal sends two SIGHUPs."""
    ignored = (
        "import os, sys, signal as s; s.signal(s.SIGINT, s.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    train = [*TRAIN, "--no-video", "--eval.no-vlm"]
    command = [sys.executable, "-c", ignored, *train, "--steps=100000", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True) as process:
        next(line for line in process.stdout if "steps/s" in line)  # the loop's first report
        for name in signals:
            os.kill(process.pid, getattr(signal, name))
        said, _ = process.communicate()
    assert process.returncode == 130
    assert f"and saved: --resume {tmp_path} continues" in said
    assert (tmp_path / "checkpoint" / "replay").is_file()
    if signals == ["SIGTERM"]:
        step = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        command = [*train, f"--steps={step + 16}", "--resume", str(tmp_path)]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["carracing-gpu"], "begun as carracing, not carracing-gpu: covr-fast train carracing --resume"),
        (["cartpole-swingup"], "the run was begun as carracing, not cartpole-swingup"),
        (["carracing", "--out", "elsewhere"], "--resume continues in its own folder: leave out --out"),
        (["carracing", "--begun-as", "cheetah-run"], "covr-fast train cheetah-run takes another preset"),
        (["carracing", "--vlm.model", "/nope"], "begun with vlm.model=nano: it cannot go on with /nope"),
        (["carracing", "--tuner.mode", "lora"], "begun with tuner.mode=full: it cannot go on with lora"),
        (["carracing", "--env.height", "64"], "begun with env.height=48: it cannot go on with 64"),
        (["carracing", "--steps", "40"], "has made 64 steps"),
        (["carracing"], "is finished: its 64 steps are done"),
        (["carracing", "--steps", "128"], "it holds no replay buffer"),
    ],
)
def test_what_a_run_cannot_be_resumed_with(arguments, message, run_folder, monkeypatch, capsys):
    out, _ = run_folder
    before = {path.name: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    assert call(monkeypatch, "train", *arguments, "--resume", str(out)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert {path.name: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"} == before


def test_a_run_of_a_version_that_did_not_record_its_preset(run_folder, monkeypatch, capsys, tmp_path):
    settings = json.loads((run_folder[0] / "config.json").read_text())
    del settings["begun_as"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert call(monkeypatch, "train", "cheetah-run", "--resume", str(tmp_path)) == 2
    said = capsys.readouterr().err
    assert "begun with env.id=CarRacing-v3, and preset cheetah-run is of CheetahRun-v1" in said


@pytest.mark.parametrize("chosen", [True, False])
def test_two_runs_started_together_get_a_folder_each_or_one_is_refused(chosen, tmp_path):
    command = [*TRAIN, "--eval.no-vlm", "--no-video", *(["--out", "mine"] if chosen else [])]
    options = {"stdout": PIPE, "stderr": PIPE, "text": True, "cwd": tmp_path}
    here = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}  # whatever is installed
    started = [subprocess.Popen(command, env=here, **options) for _ in range(2)]
    errors = sorted(process.communicate()[1] for process in started)
    codes = sorted(process.returncode for process in started)
    if chosen:
        assert codes == [0, 2]
        assert re.search("mine is being written by another run|already holds a run", "".join(errors))
        runs = [tmp_path / "mine"]
    else:
        assert codes == [0, 0]
        runs = [tmp_path / "runs" / "carracing-seed0", tmp_path / "runs" / "carracing-seed0-2"]
    for run in runs:
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(steps)
        assert steps.count(16) == 1


@pytest.mark.parametrize("ending", ["| head -1", "> /dev/full", ">&-"])
def test_a_run_outlives_its_display(ending, tmp_path):
    command = f"{' '.join(TRAIN)} --eval.no-vlm --no-video --out {tmp_path / 'run'} {ending}"
    shell = ["bash", "-o", "pipefail", "-c", command]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 64


def test_output_that_cannot_be_written_is_one_line():
    command = f"{' '.join(COVR)} --help > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == "error: [Errno 28] No space left on device\n"
    assert done.returncode == 2


def test_nothing_is_overwritten(run_folder, monkeypatch, capsys):
    out, _ = run_folder
    before = (out / "summary.json").read_bytes()
    assert call(monkeypatch, "train", "carracing", "--out", str(out)) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (out / "summary.json").read_bytes() == before


def test_evaluate_a_run_without_a_checkpoint(run_folder, monkeypatch, capsys, tmp_path):
    shutil.copy(run_folder[0] / "config.json", tmp_path)
    assert call(monkeypatch, "evaluate", str(tmp_path)) == 2
    assert f"no checkpoint in {tmp_path}: is it the folder of a run?" in capsys.readouterr().err


def test_evaluate(run_folder, monkeypatch, capsys):
    out, _ = run_folder
    assert call(monkeypatch, "evaluate", str(out), "--episodes", "2") == 0
    assert "over 2 episodes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "returns, said",
    [
        ([0.0021, 0.0043], "returns: 0.0021 0.0043\nCarRacing-v3: 0.0032 ± 0.0011 over 2 episodes"),
        ([340.4, 2.0], "returns: 340 2\nCarRacing-v3: 171.2 ± 169.2 over 2 episodes"),
        ([0.25], "returns: 0.25\nCarRacing-v3: 0.25 over 1 episode\n"),
    ],
)
def test_evaluate_shows_returns_of_any_size(returns, said, run_folder, monkeypatch, capsys):
    monkeypatch.setattr("covr_fast.evaluate.evaluate", lambda *_, **__: Evaluation(np.array(returns)))
    arguments = ("evaluate", str(run_folder[0]), "--episodes", str(len(returns)))
    assert call(monkeypatch, *arguments) == 0
    assert said in capsys.readouterr().out


def test_report_compares_runs(run_folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    out, _ = run_folder
    (out / "curves.png").unlink()
    other = shutil.copytree(out, tmp_path / "other")
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"seed": 1}))
    assert call(monkeypatch, "report", str(out), str(other)) == 0
    assert "runs compared" in capsys.readouterr().out
    assert (out / "curves.png").exists()
    assert (tmp_path / "report.html").exists()


def test_report_calls_runs_by_what_tells_them_apart(run_folder, monkeypatch, capsys, tmp_path):
    first, second = (shutil.copytree(run_folder[0], tmp_path / name / "run") for name in ("a", "b"))
    settings = json.loads((second / "config.json").read_text())
    settings["covr"]["cold_start"] = 7
    settings["log_every"] = 1  # changes nothing in the result
    (second / "config.json").write_text(json.dumps(settings))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "report", str(first), str(second)) == 0
    said = capsys.readouterr().out
    for name, label in (("a/run", "covr.cold_start=2"), ("b/run", "covr.cold_start=7")):
        assert f"{name}, fast · covr, {label}: CarRacing-v3, seed 0" in said
        assert said.count(f"fast · covr, {label}") == 2  # over its own tables, and in the comparison
    assert "log_every" not in said


def test_doctor_needs_nothing_of_what_may_be_missing(monkeypatch, capsys):
    for name in ("tyro", "rich"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    monkeypatch.delitem(sys.modules, "covr_fast.doctor", raising=False)
    assert call(monkeypatch, "doctor") == 0
    assert re.search("covr-fast train .*ready", capsys.readouterr().out)


def test_a_reader_that_has_gone_is_no_error():
    command = [*TRAIN, "--help"]
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_a_discrete_environment_is_one_line_on_stderr(tmp_path):
    """In a process of its own: gymnasium warns of EnvPool's bounds once."""
    command = [*TRAIN, "--env.id", "CartPole-v1", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "has discrete actions" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_nan_reward_ends_the_run_with_one_line(monkeypatch, capsys, tmp_path):
    from covr_fast.envs import PixelEnvs

    advance = PixelEnvs._advance

    def poisoned(self, action, ids):
        simulator = self._simulators[int(ids[0]) // self.config.batch_size]
        step = type(simulator).step

        class Poisoned:
            def step(self, *arguments):
                frame, reward, *rest = step(simulator, *arguments)
                return frame, reward * float("nan"), *rest

            def close(self):
                """Nothing to free."""

        self._simulators = [Poisoned()] * len(self._simulators)
        return advance(self, action, ids)

    monkeypatch.setattr(PixelEnvs, "_advance", poisoned)
    assert call(monkeypatch, "train", "carracing", "--out", str(tmp_path / "run"), *FLAGS) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: environment CarRacing-v3 returned a reward that is not finite")
    assert "\n" not in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trane"], "unknown command 'trane': did you mean train"),
        (["train", "carracin"], "unknown preset 'carracin': did you mean carracing"),
        (["train", "carracing", "--vlm.model", "./no-such-model", "--out", "OUT"], "no-such-model"),
        (["train", "carracing", "--vlm.quantization", "4bit", "--out", "OUT"], "use tuner.mode='lora'"),
        (["evaluate", "OUT"], "is it the folder of a run?"),
        (["train", "carracing", "--vlm.decimals", "5", "--out", "OUT"], "vlm.decimals=5 must be at most 4"),
        (["train", "carracing", "--out", "/dev/null/run"], "/dev/null is a file, not a folder"),
        (["train", "carracing", "--resume", "OUT"], "is it the folder of a run?"),
        (["evaluate", "OUT", "--seed", "-1"], "--seed -1 must be at least 0"),
        (["report", "OUT"], "there is no such folder"),
        (["report"], "at least one run folder"),
    ],
)
def test_user_mistakes_are_one_line_and_exit_code_2(arguments, message, monkeypatch, capsys, tmp_path):
    arguments = [str(tmp_path / "run") if a == "OUT" else a for a in arguments]
    assert call(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.startswith("error: ")
    assert "\n" not in error
    assert not (tmp_path / "run").exists()


def test_unknown_field(monkeypatch, capsys):
    assert call(monkeypatch, "train", "carracing", "--env.num-env", "3") == 2
    assert "num-env" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["evaluate"], ["train", "carracing", "--resume"]])
def test_a_setting_of_another_version_is_named_with_the_nearest(command, monkeypatch, capsys, tmp_path):
    settings = TrainConfig.preset("carracing").to_dict()
    settings["vlm"]["refresh"] = settings["vlm"].pop("refresh_priors")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert call(monkeypatch, *command, str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert "unknown setting 'vlm.refresh': did you mean vlm.refresh_priors" in error
    assert "rename it there, or remove it" in error


def test_help_lists_presets_and_fields(monkeypatch, capsys):
    assert call(monkeypatch, "train", "--help") == 0
    assert "cheetah-run" in capsys.readouterr().out
    assert call(monkeypatch, "train", "carracing", "--help") == 0
    text = capsys.readouterr().out
    for field in ("--covr.threshold", "--vlm.model", "--tuner.", "--env.action-repeat", "--replay.augment"):
        assert field in text
    assert "--vlm.quantization {auto,none,8bit,4bit}" in text


@pytest.mark.parametrize(
    "command, usage",
    [
        ("evaluate", "RUN [--episodes INT]"),
        ("audit", "RUN [--rows INT]"),
        ("push", "RUN REPO"),
        ("report", "RUN..."),
    ],
)
def test_help_names_what_a_command_takes(command, usage, monkeypatch, capsys):
    assert call(monkeypatch, command, "--help") == 0
    said = capsys.readouterr().out
    assert usage in said
    assert "--no-" not in said


def test_importing_the_package_is_light():
    code = (
        "import sys, torch, time; t = time.perf_counter();"
        "import covr_fast; covr_fast.ReplayBuffer; covr_fast.ops;"
        "took = time.perf_counter() - t; assert took < 0.3, took;"
        "heavy = {'transformers', 'envpool', 'peft', 'gymnasium'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_of_a_flag_that_is_repeated_the_last_value_counts():
    arguments = ["--resume", "a", "--vlm.model=b", "--resume=c", "--vlm.model", "d"]
    assert common.value_of("--resume", arguments) == "c"
    assert common.value_of("--vlm.model", arguments) == "d"
