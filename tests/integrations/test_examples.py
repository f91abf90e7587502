"""The examples run as they are."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *args: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *args]
    # One thread: spinning worker threads are what is slow on a busy machine.
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, env=one_thread)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_sb3_sac_carracing():
    for module in ("stable_baselines3", "Box2D", "pygame"):
        pytest.importorskip(module)
    assert "(9, 96, 96) uint8 x3" in run("sb3_sac_carracing.py", "120")


def test_torchrl_replay():
    pytest.importorskip("torchrl")
    assert "prioritized" in run("torchrl_replay.py", "600")


@pytest.mark.slow
def test_own_task(tmp_path):
    """It learns, and the command line finds its environment again."""
    out = tmp_path / "run"
    said = run("own_task.py", "3000", str(out))
    assert "round 2 at" in said
    random, trained = map(float, re.search(r"episodes: (\S+) with random .*, (\S+) by the", said).groups())
    assert trained > random + 3
    assert "You control the small square." in (out / "prompt.txt").read_text()
    assert json.loads((out / "summary.json").read_text())["environment"] == "own_task:Reach"
    assert (out / "answers.jsonl").read_text().count('"version": 1') > 0
    command = [sys.executable, "-m", "covr_fast.cli", "evaluate", str(out), "--episodes=20"]
    again = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    mean = float(re.search(r"own_task:Reach: (\S+) ± .* over 20 episodes", again.stdout)[1])
    assert mean > random + 3, again.stderr


def test_gpu_simulator():
    said = run("gpu_simulator.py", "4", "20")
    assert "steps/s" in said
    assert "ReplayBuffer(80/100000 transitions of 4 environments" in said


def test_weighted_sft():
    pytest.importorskip("datasets")
    right = [int(count) for count in re.findall(r"(\d+) of 100 sums right", run("weighted_sft.py", "150"))]
    before, alike, weighted = right
    assert before < 20
    assert weighted > alike + 20
