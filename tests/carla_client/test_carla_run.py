"""The presets as a user runs them, on stand-ins for the two servers that a run needs."""

import json

import pytest
from carla_stand_in import Running

from covr_fast import TrainConfig, cli
from covr_fast.carla import address, connection
from covr_fast.errors import UserError

SMALL = {
    "steps": 60, "warmup": 20, "log-every": 10, "decisions-per-update": 10, "threads": 1, "device": "cpu",
    "env.height": 32, "env.width": 32, "env.max-episode-steps": 8, "replay.pad": 2, "replay.batch-size": 8,
    "replay.capacity": 100, "agent.hidden": 16, "vlm.model": "nano", "vlm.every": 2, "tuner.mode": "full",
    "tuner.max-steps": 2, "covr.psi-0": 20, "covr.min-samples": 4, "covr.cold-start": 1, "eval.episodes": 2,
}  # fmt: skip


def train(name: str, out, **changes) -> list[str]:
    """The command line of a small run."""
    fields = [f"--{key}={value}" for key, value in (SMALL | changes).items()]
    return [
        "train", name, "--out", str(out), "--no-video", *fields,
        "--agent.channels", "8", "8", "--agent.strides", "4", "2",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["carla-highway", "carla-pedestrians"])
def test_a_run(servers, name, tmp_path):
    servers["localhost", 2000], servers["localhost", 2010] = Running(), Running()
    assert cli.run(train(name, tmp_path)) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["rounds"]
    assert {"random", "vlm_before", "vlm_after", "actor"} <= summary["evaluations"].keys()
    assert cli.run(["evaluate", str(tmp_path), "--episodes", "1"]) == 0


def test_a_run_whose_server_dies_goes_on_with_another(servers, tmp_path):
    servers["localhost", 2000], servers["localhost", 2010] = Running(dies_at=150), Running()
    with pytest.raises(
        UserError, match=r"the CARLA server at localhost:2000 failed .* goes on with --resume"
    ):
        cli.run([*train("carla-highway", tmp_path), "--eval.no-vlm"])
    servers["localhost", 3000], servers["localhost", 3010] = Running(), Running()
    assert (
        cli.run(["train", "carla-highway", "--resume", str(tmp_path), "--env.server", "localhost:3000"]) == 0
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 60
    assert servers["localhost", 3000].seeds


def test_without_a_server_a_run_ends_with_one_line(monkeypatch, tmp_path, capsys):
    """By the real client."""
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(address, "_IN_USE", set())
    arguments = train("carla-highway", tmp_path / "run", **{"env.server": "localhost:1"})
    monkeypatch.setattr("sys.argv", ["covr-fast", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: no CARLA server answers at localhost:1 (time-out of 200ms")
    assert "\n" not in said
    assert not (tmp_path / "run").exists()
    assert not address._IN_USE


@pytest.mark.parametrize("name", ["carla-highway", "carla-pedestrians"])
def test_the_papers_settings(name):
    config = TrainConfig.preset(name)
    assert config.env.id == name
    assert config.vlm.model == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert config.agent.prior_weight == 2.0
    assert (config.tuner.lora_rank, config.tuner.lora_alpha) == (128, 256)
    assert (config.covr.cold_start, config.steps, config.env.max_episode_steps) == (2, 100_000, 1000)
    config.check()
