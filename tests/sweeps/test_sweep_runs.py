"""Sweeps as a user starts them: runs that are skipped, resumed, named if they break, interrupted."""

import io
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from rich.console import Console
from small_runs import COVR, TINY, call

from covr_fast.checkpoint import load_config
from covr_fast.report import read_summary
from covr_fast.run_folder import RunFolder
from covr_fast.sweeps import processes
from covr_fast.sweeps.spec import read_spec
from covr_fast.sweeps.states import State, find_runs
from covr_fast.sweeps.table import Progress

SETTINGS = "\n".join(f"{name.replace('-', '_')} = {value}" for name, value in (TINY | {"steps": 160}).items())
SPEC = f"""
summary = "Tiny runs"
presets = ["carracing"]
seeds = [0, 1]
[settings]
video = false
{SETTINGS}
[groups.alone]
method = "off"
[groups.blocked]
method = "per"
"""


def spec_file(folder: Path, text: str = SPEC) -> str:
    path = folder / "tiny.toml"
    path.write_text(text)
    return str(path)


def sweep(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    code = call(monkeypatch, "sweep", *arguments, "--no-estimate")
    shown = capsys.readouterr()
    return code, shown.out + shown.err


def times(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.rglob("summary.json")}


def test_a_broken_run_is_named_the_others_go_on_and_finished_ones_are_skipped(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    arguments = [spec_file(tmp_path), "--jobs", "2"]
    out = Path("sweeps/tiny")
    blocked = out / "carracing" / "blocked" / "seed-1"
    blocked.parent.mkdir(parents=True)
    blocked.touch()
    code, shown = sweep(monkeypatch, capsys, *arguments)
    assert code == 1
    assert "Tiny runs: 4 runs, into sweeps/tiny, 2 at a time" in shown
    assert len(re.findall(r"\[\d/4\] carracing/\w+/seed-[01] -?\d+\.\d ± \d+\.\d in \d+ s", shown)) == 3
    assert f"carracing/blocked/seed-1 ended with exit code 2; the end of {blocked}.log:" in shown
    assert f"  error: {blocked} is a file, not a folder" in shown, "its last lines are not shown"
    assert "1 of 4 runs are broken: the same command tries them again" in shown
    assert [load_config(out / f"carracing/alone/seed-{seed}").seed for seed in (0, 1)] == [0, 1]
    finished = times(out)
    assert len(finished) == 3

    blocked.unlink()
    code, shown = sweep(monkeypatch, capsys, *arguments)
    assert code == 0, shown
    assert "4 runs, 3 of them finished" in shown
    assert finished.items() <= times(out).items(), "a finished run was made again"
    assert len(times(out)) == 4

    code, shown = sweep(monkeypatch, capsys, *arguments)
    assert (code, "4 of them finished" in shown, "running" in shown) == (0, True, False)
    code, shown = sweep(monkeypatch, capsys, *arguments, "--steps", "320")
    assert code == 2
    assert "holds a run with steps=160, and the sweep asks for 320" in shown


@pytest.mark.parametrize(
    "signals", [[signal.SIGINT], [signal.SIGHUP, signal.SIGHUP, signal.SIGTERM]], ids=len
)
def test_an_interrupted_sweep_goes_on_where_it_was(signals, monkeypatch, capsys, tmp_path):
    path = spec_file(tmp_path, SPEC.partition("[groups.blocked")[0].replace("steps = 160", "steps = 40_000"))
    out = tmp_path / "out"
    begun = [*COVR, "sweep", path, "--seeds", "1", "--out", str(out), "--no-estimate"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = out / "carracing/alone/seed-0"
    with subprocess.Popen(begun, stdout=subprocess.PIPE, text=True, env=environment) as process:
        until = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 20:
            assert time.monotonic() < until
            time.sleep(0.1)
        for number in signals:  # a terminal that closes sends several
            process.send_signal(number)
            time.sleep(0.3)
        shown, _ = process.communicate(timeout=120)
        assert process.returncode == 130
    assert "0 of 1 runs are finished: the same command goes on with the others" in shown
    assert not (run / "summary.json").exists()
    assert (run / "checkpoint" / "replay").exists(), "the run was not saved"
    said = run.with_name("seed-0.log").read_text()
    at = int(re.findall(r"interrupted at step (\d+) and saved", said)[0])
    assert 0 < at < 40_000

    code, shown = sweep(monkeypatch, capsys, path, "--seeds", "1", "--out", str(out), "--steps", str(at + 64))
    assert code == 2
    assert "holds a run with steps=40000" in shown
    config = run / "config.json"
    config.write_text(config.read_text().replace('"steps": 40000', f'"steps": {at + 64}'))
    code, shown = sweep(monkeypatch, capsys, path, "--seeds", "1", "--out", str(out), "--steps", str(at + 64))
    assert code == 0, run.with_name("seed-0.log").read_text()
    assert read_summary(run)["steps"] >= at + 64
    assert f"from step {at}" in run.with_name("seed-0.log").read_text()


def test_what_is_left_of_a_run_that_cannot_go_on_is_set_aside(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path, out = spec_file(tmp_path, SPEC.partition("[groups.blocked")[0]), tmp_path / "out"
    run = out / "carracing/alone/seed-0"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 16}\n')
    code, shown = sweep(monkeypatch, capsys, path, "--seeds", "1", "--out", str(out))
    assert code == 0, shown
    assert (run.with_name("seed-0.broken-1") / "metrics.jsonl").read_text() == '{"step": 16}\n'
    assert read_summary(run)["seed"] == 0


def test_a_dry_run_starts_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, shown = sweep(
        monkeypatch, capsys, spec_file(tmp_path), "--dry-run", "--only", "alone", "--jobs", "2"
    )
    assert code == 0
    assert shown.count("covr-fast train carracing --method=off") == 2
    assert shown.count("--threads=1") == 2, "the spec says how many"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.toml"]


def test_the_specs_are_listed(monkeypatch, capsys):
    assert call(monkeypatch, "sweep", "--help") == 0
    listed = capsys.readouterr().out
    for name in ("dmcontrol", "ablations", "racetrack"):
        assert re.search(rf"^  {name} +\S", listed, re.MULTILINE)


@pytest.mark.parametrize(
    "gpus, given, expected", [(0, {}, [None] * 3), (2, {}, ["0", "1", "0"]), (1, {}, [None] * 3)]
)
def test_runs_take_turns_on_several_gpus(gpus, given, expected, monkeypatch, tmp_path):
    seen = []

    class Process:
        returncode = 1

        def __init__(self, *_, env, **__) -> None:
            seen.append(env.get("CUDA_VISIBLE_DEVICES"))

        def poll(self):
            return 1

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr(processes.subprocess, "Popen", Process)
    monkeypatch.setattr(processes, "_LOOK_EVERY", 0)
    spec = read_spec(spec_file(tmp_path), seeds=3, only=["alone"])
    processes.Jobs(find_runs(spec.runs, tmp_path / "out"), 3, lambda: None, threads=None, gpus=gpus).work()
    assert seen == expected


def test_a_run_that_another_process_writes_is_left_alone(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path, out = spec_file(tmp_path, SPEC.partition("[groups.blocked")[0]), tmp_path / "out"
    run = out / "carracing/alone/seed-0"
    with RunFolder(run).claimed(resume=False):
        (run / "metrics.jsonl").write_text('{"step": 16}\n')
        code, shown = sweep(monkeypatch, capsys, path, "--seeds", "1", "--out", str(out))
    assert code == 1
    assert "carracing/alone/seed-0 another process writes it" in shown
    assert (
        f"{run} is being written by another process: once that has ended, the same command goes on" in shown
    )
    assert "broken" not in shown
    assert (run / "metrics.jsonl").read_text() == '{"step": 16}\n'
    assert [each.name for each in run.parent.iterdir()] == ["seed-0"]


@pytest.mark.parametrize("finishes", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_a_run_that_another_process_wrote_is_looked_at_again(finishes, before, monkeypatch, tmp_path):
    """That process claims the folder before we look, or only before our own process does. It ends, with a
    summary or without one, while another run is running here."""
    runs = find_runs(read_spec(spec_file(tmp_path), seeds=2, only=["alone"]).runs, tmp_path / "out")
    theirs, ours = (run.folder for run in runs)
    other = RunFolder(theirs).claimed(resume=False)
    started, seen = [], []

    class Process:
        returncode = 2

        def __init__(self, command, **_) -> None:
            self.folder, self.looks = Path(command[-1]), 0
            started.append(self.folder)
            if not before and started == [theirs]:
                other.__enter__()

        def poll(self):
            self.looks += 1
            if self.folder == ours and self.looks < 5:
                return None
            if not RunFolder(self.folder).is_claimed():
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / "summary.json").touch()
            return 2

    def changed() -> None:
        seen.append(runs[0].state)
        if seen[-2:] == [State.ELSEWHERE] * 2:
            if finishes:
                (theirs / "summary.json").touch()
            other.__exit__(None, None, None)

    if before:
        other.__enter__()
    monkeypatch.setattr(processes, "_LOOK_EVERY", 0)
    monkeypatch.setattr(processes.subprocess, "Popen", Process)
    processes.Jobs(runs, 2, changed, threads=None).work()
    assert State.ELSEWHERE in seen
    assert State.BROKEN not in seen
    assert [run.state for run in runs] == [State.FINISHED] * 2
    assert started.count(theirs) == (not before) + (not finishes)


def test_an_estimate_is_made_before_it_starts(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = SPEC.replace("[groups.blocked]", "[groups.blocked]\nsettings.env.id = 'NoSuchTask-v1'")
    out = tmp_path / "out"
    assert call(monkeypatch, "sweep", spec_file(tmp_path, text), "--seeds", "1", "--out", str(out)) == 1
    shown = capsys.readouterr().out
    assert re.search(r"  carracing, alone: \d+ (s|min) a run, by its parts timed alone", shown)
    assert re.search(r"  carracing, blocked: not timed \(.*NoSuchTask-v1", shown)
    assert re.search(r"estimated: \d+ (s|min) for 2 runs, without those that could not be timed", shown)
    assert shown.index("estimated") < shown.index("running")


def test_a_low_terminal_shows_what_is_running(tmp_path):
    text = SPEC.partition("[groups.alone]")[0] + "".join(
        f"[groups.g{i}]\nmethod = 'off'\n" for i in range(30)
    )
    runs = find_runs(read_spec(spec_file(tmp_path, text)).runs, tmp_path / "out")
    runs[7].state, runs[40].state, runs[40].exit_code = State.RUNNING, State.BROKEN, 1

    def shown(height: int) -> str:
        file = io.StringIO()
        console = Console(file=file, width=80, height=height, force_terminal=True)
        with Progress(runs, console) as progress:
            progress.update()
            at = file.tell()
            progress.update()
            return file.getvalue()[at:]

    high, low = shown(60), shown(20)
    assert all(f" g{i} " in high for i in range(30))
    assert {i for i in range(30) if f" g{i} " in low} == {3, 20}
    assert "broken (1)" in low
    assert "0 of 60 runs are finished" in low
