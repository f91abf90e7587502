"""The GPU check as far as it goes without a GPU: its plan, how stages run, and a rehearsal of them all."""

import json
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from covr_fast.env_config import EnvConfig
from covr_fast.envs import make_env

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu.execution import Check, failures  # noqa: E402
from gpu.stages import Stage, fitting, groups, rehearsal, stages  # noqa: E402
from gpu.targets import TARGETS  # noqa: E402

CUDA = stages("cuda", "90", Path("tests.xml"))


def command(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def check(tmp_path) -> Check:
    made = Check(tmp_path, time.monotonic() + 100, {}, 2)
    made.result |= {"device": "none", "begun": "today"}
    return made


# ---- the plan ----


def test_what_does_not_fit_is_left_out_from_the_end():
    chain = [Stage("a", [], 10, 10), Stage("b", [], 20, 20, group="g"), Stage("c", [], 30, 30, group="g")]
    assert [stage.name for stage in fitting(chain, 40)] == ["a", "b", "c"]  # b and c run at once
    assert [stage.name for stage in fitting(chain, 39)] == ["a", "b"]
    assert fitting(chain, 9) == []


def test_figures_come_alone_and_before_tests_and_sanitizers():
    together = [[stage.name for stage in group] for group in groups(CUDA)]
    assert together[:2] == [["build"], ["smoke"]]
    assert together[-3:] == [["tests", "memcheck", "racecheck"], ["compiled"], ["agents"]]
    assert all(len(group) == 1 or not any(stage.figures for stage in group) for group in groups(CUDA))


def test_every_stage_is_rehearsed():
    assert [stage.name for stage in rehearsal(Path("tests.xml"))] == [stage.name for stage in CUDA]


def test_targets_name_rows_that_the_benchmarks_have():
    suites = ["benchmarks/bench_ops.py", "benchmarks/bench_gather.py"]
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "needs_cuda", *suites],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = [line.partition("::test_")[2] for line in listed.stdout.splitlines() if "::test_" in line]
    contestants = dict.fromkeys(["ours", "ours, all rows", "liger"], 2.0)
    every = {name: {"seconds": contestants, "limit": 1.0, "on_device": (2.0, "graph")} for name in names}
    of_suites = [target for target in TARGETS if target.stage not in ("update", "prior", "overlap")]
    for target in of_suites:
        assert target.value(every) in (0.5, 1.0, 2.0), target.what
    assert {target.stage for target in TARGETS} <= {stage.name for stage in CUDA}


# ---- running stages ----


def test_a_red_stage_hides_nothing_but_a_failed_build_ends_all(check):
    red, green = (
        Stage("red", command("import sys; sys.exit('why')"), 1, 60),
        Stage("green", command(""), 1, 60),
    )
    check.run([red, green])
    written = json.loads((check.out / "gpu.json").read_text())
    assert not written["ok"]
    assert written["stages"]["red"]["said"] == ["why", "exit status 1"]
    assert written["stages"]["green"]["ok"]
    check.run([Stage("build", command("exit(1)"), 1, 60), green, red])
    assert check.result["left out"] == ["green", "red"]
    assert "| green | left out |" in (check.out / "gpu.md").read_text()


def test_a_stage_over_its_limit_is_ended_with_all_that_it_started(check):
    test = "tests/test_x.py::test_a[two words]"
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\n"
        f"print('{test} FAILED   [ 5%]', child.pid, sep='\\n', flush=True)\n"
        "time.sleep(100)"
    )
    check.run([Stage("slow", command(code), 1, 8), Stage("next", command(""), 1, 60)])
    slow = check.result["stages"]["slow"]
    assert (slow["ok"], slow["failures"]) == (False, [test])
    assert slow["said"][-1] == "ended after 8 s"
    child = next(int(line) for line in slow["said"] if line.isdigit())
    assert not alive(child)
    assert check.result["stages"]["next"]["ok"]


def alive(process: int) -> bool:
    """A zombie, whose new parent has not looked yet, is not."""
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_figures_are_kept_and_the_log_has_all_output(check):
    code = (
        "import json, sys; print('said first'); print('said last');"
        "row = {'ratio': {}, 'seconds': {'ours': 1}, 'unavailable': {'peer': 'no such peer'}};"
        "open(sys.argv[1].partition('=')[2], 'w').write(json.dumps({'row': row}))"
    )
    check.run([Stage("measuring", command(code), 1, 60, "--json")])
    outcome = check.result["stages"]["measuring"]
    assert outcome["figures"]["row"]["seconds"] == {"ours": 1}
    assert outcome["said"] == ["said last"]
    assert "said first\nsaid last" in (check.out / "log.txt").read_text()
    assert "not measured: no such peer" in (check.out / "gpu.md").read_text()
    assert {file.name for file in check.out.iterdir()} == {"gpu.json", "gpu.md", "log.txt"}


def test_after_the_deadline_nothing_is_begun(check):
    check.stop()
    check.run([Stage("late", command(""), 1, 60)])
    assert check.result["stages"]["late"]["said"] == ["not run: no time was left"]
    assert not check.result["ok"]


def test_failures_are_found_in_every_form_of_pytests_output():
    output = """
tests/a.py::test_one[x y] PASSED                              [ 10%]
tests/a.py::test_two[x y] FAILED                              [ 20%]
[gw3] [ 30%] FAILED tests/a.py::test_three[1-2]
[gw0] [ 31%] PASSED tests/a.py::test_four
ERROR tests/b.py::test_five - ValueError: no
ERROR tests/c.py - ImportError while importing test module
FAILED tests/a.py::test_two[x y] - assert 1 == 2
"""
    assert failures(output) == [
        "tests/a.py::test_two[x y]", "tests/a.py::test_three[1-2]", "tests/b.py::test_five", "tests/c.py"
    ]  # fmt: skip


# ---- the stages themselves ----


PLANTED = """
import os, time
from gpu import smoke

def wrong(device):
    raise AssertionError("other numbers")

smoke.CHECKS = {
    "right": lambda device: None,
    "wrong": wrong,
    "crashing": lambda device: os.kill(os.getpid(), 9),
    "hanging": lambda device: time.sleep(100),
}
raise SystemExit(smoke.main())
"""


def test_the_smoke_names_what_is_wrong_what_crashes_and_what_hangs():
    done = subprocess.run(
        [*command(PLANTED), "--device", "cpu", "--seconds", "10"],
        cwd=ROOT / "benchmarks", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "right: ok" in done.stdout
    assert re.search(r"wrong: FAILED\n.*other numbers", done.stdout, re.DOTALL)
    assert "crashing: FAILED, ended by signal 9" in done.stdout
    assert "hanging: FAILED, ended after 10 s" in done.stdout
    assert done.stdout.rstrip().endswith("FAILED: wrong, crashing, hanging")


def test_the_road_behaves_as_carracing_does(monkeypatch):
    """Through the project's own environments: shapes, reward, and the reset in the step after an end."""
    road = runpy.run_path(str(ROOT / "benchmarks" / "gpu" / "simulator" / "envpool.py"))
    monkeypatch.setitem(sys.modules, "envpool", SimpleNamespace(**road))
    config = EnvConfig(num_envs=2, batch_size=2, max_episode_steps=12, action_repeat=4)
    with make_env(config) as envs:
        (ids,) = envs.batches()
        first = envs.reset()
        envs.send(np.zeros((2, 2)), ids)
        straight = envs.recv()
        envs.send(np.zeros((2, 2)), ids)
        envs.recv()
        envs.send(np.zeros((2, 2)), ids)
        last = envs.recv()
        envs.send(np.full((2, 2), 1.0), ids)  # to the right, as fast as it goes
        right = envs.recv()
    assert first.shape == (2, 9, 84, 84)
    assert (last.truncated.all(), straight.truncated.any()) == (True, False)
    assert np.array_equal(last.obs, first)  # a new episode begins as the first did
    assert (straight.reward > right.reward).all()
    assert (right.next_obs[:, -3:] != first[:, -3:]).any(axis=(1, 2, 3)).all()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_check_is_rehearsed_on_a_cpu(tmp_path):
    """No stage dies of a typo: all scripts run, at tiny sizes, and their figures arrive."""
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_check.py", "--device", "cpu", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["ok"]
    assert list(result["stages"]) == [stage.name for stage in CUDA]
    for stage in CUDA:
        assert bool(stage.figures) == ("figures" in result["stages"][stage.name]), stage.name
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.md", "log.txt", "tests.xml"}
