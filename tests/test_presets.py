"""Every preset as a user runs it: its environment at full size, and a small run of all parts of the loop."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from covr_fast import TrainConfig, cli, make_env
from covr_fast.envs import PixelEnvs
from covr_fast.methods import METHODS
from covr_fast.presets import PRESETS

NAMES = (
    "carracing", "carracing-full", "carracing-gpu", "racetrack", "highway",
    "cartpole-swingup", "reacher-easy", "cheetah-run", "walker-walk",
    "finger-spin", "ball-in-cup-catch", "hopper-hop", "walker-run", "pendulum-swingup",
)  # fmt: skip
OWN = "custom"
"""The one for an environment of the user's: tests/test_own_environment.py runs it."""
SERVED = ("carla-highway", "carla-pedestrians")
"""Those that need a server: tests/carla_client runs them on a stand-in."""
SMALL = {
    "decisions-per-update": 8, "threads": 1, "device": "cpu",
    "env.num-envs": 4, "env.batch-size": 2, "env.num-threads": 1, "agent.hidden": 32,
    "replay.batch-size": 16, "replay.capacity": 200, "vlm.model": "nano",
    "tuner.mode": "full", "tuner.max-steps": 3, "covr.min-samples": 4,
    "covr.cold-start": 1, "eval.episodes": 1,
}  # fmt: skip


DECISIONS = {
    "steps": 72, "warmup": 24, "log-every": 12, "vlm.every": 2, "covr.psi-0": 24, "env.max-episode-steps": 10,
}  # fmt: skip
"""What is given in environment steps."""


def test_no_preset_and_no_method_is_left_out(capsys):
    assert cli.run(["train", "--help"]) == 0
    presets, methods = capsys.readouterr().out.split("--method METHOD")
    for text, names in ((presets, [*NAMES[:5], OWN, *NAMES[5:], *SERVED]), (methods, METHODS)):
        assert re.findall(r"^  (\S+) ", text, re.MULTILINE) == list(names)
    assert presets.count("two CPU cores: ") == presets.count("one GPU: ") == len(PRESETS)


@pytest.mark.parametrize("name", NAMES)
def test_its_environment_steps_and_shows_what_moves(name):
    config = TrainConfig.preset(name).env
    rng = np.random.default_rng(0)
    with make_env(config) as envs:
        first = envs.reset()
        assert first.shape == (config.num_envs, *config.obs_shape)
        assert (first.std(axis=(1, 2, 3)) > 10).all(), "an empty frame"
        for _ in range(2):
            for ids in envs.batches():
                envs.send(rng.uniform(-1, 1, (len(ids), *envs.action_shape)), ids)
            rows = [envs.recv() for _ in envs.batches()]
        assert sum(r.frames for r in rows) == config.num_envs * config.action_repeat
        for r in rows:
            before, now = r.next_obs[:, : config.channels], r.next_obs[:, -config.channels :]
            assert (before != now).any(axis=(1, 2, 3)).all(), "nothing moves in the picture"
            assert np.isfinite(r.reward).all()
            # Who drives at random on the highway may crash.
            assert not (r.terminated.all() if name == "highway" else r.terminated.any())


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_fine_tunes_and_guides(name, monkeypatch, tmp_path):
    recv, rng = PixelEnvs.recv, np.random.default_rng(0)

    def paid(envs):
        """Some tasks pay nothing for so few random steps, and of equal returns the filter keeps none."""
        rows = recv(envs)
        return rows._replace(reward=rows.reward + rng.random(len(rows.reward), np.float32))

    monkeypatch.setattr(PixelEnvs, "recv", paid)
    repeat = TrainConfig.preset(name).env.action_repeat
    steps = {key: value * repeat for key, value in DECISIONS.items()}
    fields = [f"--{key}={value}" for key, value in (SMALL | steps).items()]
    networks = ["--agent.channels", "8", "8", "--agent.strides", "4", "2"]
    assert cli.run(["train", name, "--out", str(tmp_path), *fields, *networks]) == 0

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["updates"] == 6
    first = summary["rounds"][0]
    assert 0 < first["kept"] < first["samples"]
    assert first["best_log_prob_after"] != first["best_log_prob_before"]
    if first["episodes"] > 1:
        assert math.isfinite(first["loss_before"])
        assert first["loss_after"] != first["loss_before"]
    else:  # nothing can be held out
        assert "loss_before" not in first
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    guided = [line["guided"] for line in lines if "guided" in line]
    assert guided[0] == 0
    assert guided[-1] == 1
    assert {"random", "vlm_before", "vlm_after", "actor"} <= summary["evaluations"].keys()
    assert list(tmp_path.glob("episode.*"))


@pytest.mark.parametrize("method", ["off", "covr"])
@pytest.mark.parametrize("name", ["cartpole-swingup", "racetrack", "highway"])
def test_it_trains_in_a_process_of_its_own(name, method, tmp_path):
    """Nothing is loaded that another test has loaded: in which order libraries come decides about crashes."""
    repeat = TrainConfig.preset(name).env.action_repeat
    steps = {key: value * repeat for key, value in DECISIONS.items()}
    fields = [f"--{key}={value}" for key, value in (SMALL | steps).items()]
    command = ["train", name, "--method", method, "--no-video", "--out", str(tmp_path / "run"), *fields]
    done = subprocess.run(
        [sys.executable, "-m", "covr_fast.cli", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    assert json.loads((tmp_path / "run/summary.json").read_text())["updates"] == 6
