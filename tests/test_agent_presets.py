"""Agents as published, started as a user starts them, and the units of a run."""

import json

import pytest
from small_runs import small_config

from covr_fast import TrainConfig, Trainer, cli
from covr_fast.errors import UserError

KINDS = ("sac", "rad", "drq", "drqv2", "deepmdp", "fast")
SMALL = {
    "steps": 60, "warmup": 20, "log-every": 10, "threads": 1, "env.num-envs": 2, "env.batch-size": 2,
    "env.max-episode-steps": 10, "replay.batch-size": 8, "agent.hidden": 16, "agent.latent": 8,
    "covr.psi-0": 20, "covr.min-samples": 4, "covr.cold-start": 1, "vlm.every": 2, "tuner.max-steps": 2,
    "eval.episodes": 1,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_is_guided_and_plays(kind, tmp_path, capsys):
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    networks = ["--agent.channels", "8", "8", "--agent.strides", "4", "2"]
    run = str(tmp_path / kind)
    command = ["train", "racetrack", "--agent.kind", kind, "--out", run, "--no-video", *flags, *networks]
    assert cli.run(command) == 0
    assert ("for what was asked for the preset sets" in capsys.readouterr().out) == (kind != "fast")
    summary = json.loads((tmp_path / kind / "summary.json").read_text())
    per_update = 2 if kind in ("drqv2", "fast") else 1
    assert summary["updates"] == 40 // per_update
    lines = [json.loads(line) for line in (tmp_path / kind / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("guided_share", 0) > 0 for line in lines)
    assert cli.run(["evaluate", run, "--episodes", "1"]) == 0


@pytest.mark.parametrize(
    "kind, frame, batch, augment, pad, decisions",
    [
        ("sac", 84, 128, "none", 4, 1000),
        ("rad", 100, 128, "crop", 8, 1000),
        ("drq", 84, 512, "none", 4, 1000),
        ("drqv2", 84, 256, "shift", 4, 2000),
        ("deepmdp", 84, 128, "none", 4, 1000),
    ],
)
def test_a_preset_takes_what_belongs_to_an_agent(kind, frame, batch, augment, pad, decisions):
    config = TrainConfig.preset("cartpole-swingup", agent=kind)
    config.check()
    assert (config.env.height, config.env.width, config.env.grayscale) == (frame, frame, False)
    assert (config.replay.batch_size, config.replay.augment, config.replay.pad) == (batch, augment, pad)
    assert (config.env.num_envs, config.env.action_repeat) == (1, 8)
    assert config.warmup == 8 * decisions
    assert config.decisions(config.steps) == 12_500


def test_settings_of_single_tasks():
    assert TrainConfig.preset("cheetah-run").agent.lr == 2e-4
    assert TrainConfig.preset("walker-walk").agent.lr == 1e-3
    walker = TrainConfig.preset("walker-walk", agent="drqv2")
    assert (walker.replay.batch_size, walker.replay.n_step, walker.agent.std_decisions) == (512, 1, 100_000)
    assert TrainConfig.preset("cheetah-run", agent="drqv2").agent.std_decisions == 500_000


def test_an_unknown_kind_is_told_with_similar_names():
    with pytest.raises(UserError, match=r"drqv3.*drqv2"):
        TrainConfig.preset("racetrack", agent="drqv3")


def test_an_agent_that_augments_refuses_augmented_batches():
    config = TrainConfig.preset("racetrack", agent="drq")
    config.replay.augment = "shift"
    with pytest.raises(UserError, match="augments its batches itself"):
        config.check()


def test_settings_that_count_environment_steps(tmp_path):
    """With action repeat 4 a run of 240 steps makes 60 decisions."""
    config = small_config(
        steps=240, warmup=128, log_every=80, decisions_per_update=4, env__num_envs=2, env__batch_size=2,
        env__action_repeat=4, env__max_episode_steps=40, vlm__every=10, covr__psi_0=100, covr__cold_start=9,
        eval__every=120,
    )  # fmt: skip
    trainer = Trainer(config, tmp_path)
    summary = trainer.run()
    assert (summary["steps"], summary["decisions"], summary["updates"]) == (240, 60, (60 - 32) // 4)
    assert summary["frames"] <= 240
    assert summary["rounds"][0]["step"] == 104
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "decisions" in line] == [80, 160, 240]
    assert [line["step"] for line in lines if "eval/actor_mean" in line] == [120, 240]
    versions = trainer.buffer.extras(range(0, 60, 2))["prior_version"]
    # Every 10 steps of an environment: its decisions begin at steps 0, 4, 8, 12, ...
    asked = [d for d in range(30) if d == 0 or 4 * d // 10 > 4 * (d - 1) // 10]
    assert [i for i, version in enumerate(versions.tolist()) if version >= 0] == asked


def test_a_run_of_a_version_that_counted_decisions_is_refused():
    settings = TrainConfig().to_dict() | {"steps_per_update": 4}
    with pytest.raises(UserError, match=r"counted decisions as steps.*times env\.action_repeat"):
        TrainConfig.from_dict(settings)


def test_a_resumed_run_keeps_its_kind_of_agent(tmp_path, capsys):
    flags = [f"--{name}={value}" for name, value in (SMALL | {"steps": 20}).items()]
    networks = ["--agent.channels", "8", "8", "--agent.strides", "4", "2"]
    assert cli.run(["train", "racetrack", "--out", str(tmp_path), "--no-video", *flags, *networks]) == 0
    with pytest.raises(UserError, match=r"begun with agent\.kind=fast: it cannot go on with rad"):
        cli.run(["train", "racetrack", "--resume", str(tmp_path), "--agent.kind", "rad"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"std_end": 0.0}, r"agent\.std_end=0\.0 must be above 0"),
        ({"std_clip": -1.0}, r"agent\.std_clip=-1\.0 must be above 0"),
    ],
)
def test_a_noise_that_is_none(change, message):
    config = TrainConfig.preset("racetrack", agent="drqv2")
    vars(config.agent).update(change)
    with pytest.raises(UserError, match=message):
        config.check()


def test_deepmdp_predicts_one_step():
    config = TrainConfig.preset("racetrack", agent="deepmdp")
    config.replay.n_step = 3
    with pytest.raises(UserError, match=r"predict one step: set replay\.n_step=1"):
        config.check()


def test_replay_holds_a_whole_run_up_to_the_published_capacity():
    assert TrainConfig.preset("walker-run", agent="drqv2").replay.capacity == 250_000
    assert TrainConfig.preset("walker-run", agent="rad").replay.capacity == 100_000
    assert TrainConfig.preset("cartpole-swingup").replay.capacity == 100_000
    assert TrainConfig.preset("carracing-full").replay.capacity == 100_000
