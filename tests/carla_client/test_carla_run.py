"""The presets as a user runs them, on stand-ins for the two servers that a run needs."""

import json

import pytest
from carla_stand_in import Running

from covr_fast import TrainConfig, cli
from covr_fast.carla import address, connection

SMALL = {
    "steps": 60, "warmup": 20, "log-every": 10, "steps-per-update": 10, "threads": 1, "device": "cpu",
    "env.height": 32, "env.width": 32, "env.max-episode-steps": 8, "replay.pad": 2, "replay.batch-size": 8,
    "replay.capacity": 100, "agent.hidden": 16, "vlm.model": "nano", "vlm.every": 2, "tuner.mode": "full",
    "tuner.max-steps": 2, "covr.psi-0": 20, "covr.min-samples": 4, "covr.cold-start": 1, "eval.episodes": 2,
}  # fmt: skip


def train(name: str, out, **changes) -> int:
    fields = [f"--{key}={value}" for key, value in (SMALL | changes).items()]
    networks = ["--agent.channels", "8", "8", "--agent.strides", "4", "2"]
    return cli.run(["train", name, "--out", str(out), *fields, *networks, "--no-video"])


@pytest.mark.parametrize("name", ["carla-highway", "carla-pedestrians"])
def test_a_run(servers, name, tmp_path):
    servers["localhost", 2000], servers["localhost", 2010] = Running(), Running()
    assert train(name, tmp_path) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["rounds"]
    assert {"random", "vlm_before", "vlm_after", "actor"} <= summary["evaluations"].keys()
    assert cli.run(["evaluate", str(tmp_path), "--episodes", "1"]) == 0


def test_a_run_whose_server_dies_goes_on_with_another(servers, tmp_path, capsys):
    servers["localhost", 2000], servers["localhost", 2010] = Running(dies_at=150), Running()
    assert train("carla-highway", tmp_path) == 1
    said = capsys.readouterr()
    assert "the CARLA server at localhost:2000 failed" in (said.out + said.err).replace("\n", " ")
    servers["localhost", 3000], servers["localhost", 3010] = Running(), Running()
    assert cli.run(["train", "--resume", str(tmp_path), "--env.server", "localhost:3000"]) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 60


def test_without_a_server_a_run_ends_with_one_line(monkeypatch, tmp_path, capsys):
    """By the real client."""
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(address, "_IN_USE", set())
    assert train("carla-highway", tmp_path, **{"env.server": "localhost:1"}) == 1
    said = capsys.readouterr().err.strip()
    assert "no CARLA server answers at localhost:1" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("name", ["carla-highway", "carla-pedestrians"])
def test_the_papers_settings(name):
    config = TrainConfig.preset(name)
    assert config.env.id == name
    assert config.vlm.model == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert config.agent.prior_weight == 2.0
    assert (config.tuner.lora_rank, config.tuner.lora_alpha) == (128, 256)
    assert (config.covr.cold_start, config.steps, config.env.max_episode_steps) == (2, 100_000, 1000)
    config.check()
