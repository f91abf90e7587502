"""What a resumed run takes from the command line and from library users, and what it refuses."""

import json
import math
import os
import shutil
import time
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
import torch
from small_runs import at_each_step, killed, roundless, run_until, run_until_killed, small_config

from covr_fast import TrainConfig, Trainer
from covr_fast.checkpoint import load_config
from covr_fast.errors import UserError
from covr_fast.files import full_names
from covr_fast.resume import FIXED, MAY_CHANGE
from covr_fast.vlm import ActionPrior


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that was interrupted at step 56 of 120; tests that let it go on take a copy."""
    out = tmp_path_factory.mktemp("interrupted")
    run_until(Trainer(resumed_config(), out), 56)
    return out


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def resumed_config(**changes) -> TrainConfig:
    return roundless(steps=120, **changes)


def test_every_setting_is_known_to_take_effect_or_to_be_refused():
    parts = {f.name for f in fields(TrainConfig) if is_dataclass(getattr(TrainConfig(), f.name))}
    names = set(full_names(TrainConfig().to_dict()))
    assert parts == {name.split(".")[0] for name in names if "." in name}
    assert names == MAY_CHANGE | FIXED.keys()
    assert not MAY_CHANGE & FIXED.keys()


def other(value):
    """Another value of the same kind, which the checks of a configuration let pass."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, tuple):
        return (*value, 1)
    return {"lora": "full", "full": "lora", "uniform": "recent", "crop": "shift"}.get(value, "another")


@pytest.mark.parametrize("name", sorted(FIXED))
def test_a_setting_that_a_run_keeps_is_refused_by_name(name, interrupted):
    """In all at once: the first is told with its values."""
    config = resumed_config()
    before = contents(interrupted)
    *section, leaf = name.split(".")
    owner = getattr(config, section[0]) if section else config
    object.__setattr__(owner, leaf, other(getattr(owner, leaf)))  # the tuner's settings are frozen
    config.check = lambda: None  # what fits together is not asked here
    with pytest.raises(UserError, match=f"begun with {name}=") as caught:
        Trainer(config, interrupted, resume=True)
    assert "\n" not in str(caught.value)
    assert contents(interrupted) == before


def test_all_settings_that_may_not_change_are_named(interrupted):
    before = contents(interrupted)
    with pytest.raises(UserError, match=r"seed=0: it cannot go on with 3, .*; nor may env.height change"):
        Trainer(resumed_config(env__height=64, seed=3), interrupted, resume=True)
    assert contents(interrupted) == before


def test_settings_edited_in_config_json_are_refused_too(interrupted, copied):
    settings = json.loads((copied / "config.json").read_text())
    settings["replay"]["gamma"] = 0.5
    (copied / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"begun with replay.gamma=0.98: it cannot go on with 0.5"):
        Trainer(load_config(copied), copied, resume=True)


@pytest.fixture
def copied(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "copy")


def test_learning_rates_and_other_changes_take_effect(copied):
    config = resumed_config(
        agent__lr=1e-7, agent__alpha_lr=2e-7, agent__tau=0.5, vlm__every=2, covr__psi_0=90
    )
    trainer = Trainer(config, copied, resume=True)
    rates = {
        name: {group["lr"] for group in optimizer.param_groups}
        for name, optimizer in trainer.agent.optimizers().items()
    }
    assert rates == {"critic_optimizer": {1e-7}, "actor_optimizer": {1e-7}, "alpha_optimizer": {2e-7}}
    before = [p.detach().clone() for p in trainer.agent.actor.parameters()]
    trainer.run()
    after = [p.detach() for p in trainer.agent.actor.parameters()]
    moved = max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True))
    assert 0 < moved < 1e-5
    assert load_config(copied) == config
    assert [r["step"] for r in trainer.vlm.rounds.records] == [90]


def test_what_may_change_reaches_the_part_that_it_is_for(copied):
    config = resumed_config(
        threads=2, env__batch_size=4, agent__target_entropy=-7.0, replay__batch_size=8, vlm__background=True,
        covr__horizon=3, covr__psi_0=9, covr__schedule="recurrence",
    )  # fmt: skip
    config.tuner = replace(config.tuner, epochs=5, learning_rate=1e-5)
    trainer = Trainer(config, copied, resume=True)
    assert torch.get_num_threads() == 2
    assert [len(ids) for ids in trainer.envs.batches()] == [4]
    assert trainer.agent.target_entropy == -7
    assert len(trainer.sample().reward) == 8
    assert trainer.vlm.labeller is not None
    assert trainer.vlm.rounds.finished.horizon == 3
    assert (trainer.vlm.rounds.schedule.next_round, trainer.vlm.rounds.schedule.rule) == (9, "recurrence")
    assert trainer.vlm.tuner.config == config.tuner
    assert trainer.run()["steps"] == 120


def test_a_models_folder_is_known_from_anywhere(tmp_path, monkeypatch):
    ActionPrior.from_pretrained("nano", action_dim=2, decimals=1).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    config = small_config(vlm__model="model", save_replay=True, steps=40)
    Trainer(config, "run").run()
    assert load_config(tmp_path / "run").vlm.model == str(tmp_path / "model")
    monkeypatch.chdir("/")
    for model in (str(tmp_path / "model"), os.path.relpath(tmp_path / "model")):
        config = small_config(vlm__model=model, save_replay=True, steps=50)
        assert Trainer(config, tmp_path / "run", resume=True).step == 40
    assert config.doubts() == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"replay__device": "cuda"}, "replay.device='cuda' but torch sees no CUDA device"),
        ({"replay__device": "foo"}, "replay.device='foo' must be"),
        ({"vlm__attention": "foo"}, "vlm.attention='foo' must be"),
        ({"checkpoint_minutes": math.nan}, "checkpoint_minutes=nan must be at least 0"),
        ({"vlm__temperature": math.nan}, "vlm.temperature=nan must not be negative"),
        ({"agent__tau": 3.0}, r"agent.tau=3.0 must lie in \(0, 1\]"),
    ],
)
def test_a_wrong_setting_is_not_taken_for_a_damaged_checkpoint(changes, message, copied, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message) as told:
        Trainer(resumed_config(**changes), copied, resume=True)
    assert "copy of the checkpoint" not in str(told.value)


def test_a_trainer_keeps_its_threads_whatever_was_built_since(copied, tmp_path):
    trainer = Trainer(resumed_config(threads=1), copied, resume=True)
    Trainer(small_config(threads=2), tmp_path / "another")
    threads = []
    at_each_step(trainer, lambda _rows: threads.append(torch.get_num_threads()))
    trainer.run()
    assert set(threads) == {1}


def test_a_vlm_that_was_tuned_is_not_measured_as_if_untuned(copied):
    """Asked for on resuming, `eval.vlm` gives what can still be measured."""
    first = Trainer(resumed_config(covr__psi_0=60), copied, resume=True)
    run_until(first, 100)
    assert first.prior.version > 0
    summary = Trainer(resumed_config(covr__psi_0=60, eval__vlm=True), copied, resume=True).run()
    assert summary["evaluations"].keys() == {"random", "actor", "vlm_after"}


def test_config_json_is_left_alone_until_everything_is_built(copied, monkeypatch):
    before = contents(copied)

    def broken(*_, **__):
        raise UserError("no VLM today")

    monkeypatch.setattr("covr_fast.advisor.VLMTuner", broken)
    with pytest.raises(UserError, match="no VLM today"):
        Trainer(resumed_config(agent__lr=1e-5), copied, resume=True)
    assert contents(copied) == before


def test_a_run_that_has_gone_on_meanwhile_is_not_resumed_from_the_older_state(copied):
    early = Trainer(resumed_config(), copied, resume=True)
    late = Trainer(resumed_config(), copied, resume=True)
    run_until(late, 80)
    before = contents(copied)
    with pytest.raises(UserError, match="has gone on since this trainer was built"):
        early.run()
    assert contents(copied) == before


def test_a_run_whose_steps_are_done_needs_no_replay_to_be_evaluated(tmp_path, monkeypatch):
    config = roundless(steps=48)
    first = Trainer(config, tmp_path)
    monkeypatch.setattr(first.evaluations, "measure_after", killed)
    with pytest.raises(SystemExit):
        first.run()
    assert not (tmp_path / "checkpoint" / "replay").exists()
    summary = Trainer(config, tmp_path, resume=True).run()
    assert summary["steps"] == 48
    assert summary["updates"] == 2
    assert summary["evaluations"].keys() == {"random", "actor"}


def test_settings_of_an_older_version_have_their_defaults(copied):
    settings = json.loads((copied / "config.json").read_text())
    for name in ("checkpoint_minutes", "begun_as", "eval"):
        del settings[name]
    del settings["vlm"]["graph"]
    (copied / "config.json").write_text(json.dumps(settings))
    counters = torch.load(copied / "checkpoint" / "counters.pt")
    del counters["settings"]  # nor did it keep them in the checkpoint
    torch.save(counters, copied / "checkpoint" / "counters.pt")
    config = load_config(copied)
    assert config.checkpoint_minutes > 0
    assert config.eval == TrainConfig().eval
    assert Trainer(config, copied, resume=True).step == 56


def test_numpy_numbers_and_paths_are_settings_like_others(copied, tmp_path):
    config = small_config(
        steps=np.int64(48), covr__psi_0=1000, agent__channels=tuple(np.array([8, 8])),
        replay__gamma=np.float32(0.5), checkpoint_every=np.int32(40),
        vlm__model=copied / "checkpoint" / "vlm",
    )  # fmt: skip
    Trainer(config, tmp_path / "run").run()
    read = load_config(tmp_path / "run")
    assert read.steps == 48
    assert read.replay.gamma == 0.5
    with pytest.raises(UserError, match="is finished"):
        Trainer(config, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"steps": "many"}, "config.json: steps='many' must be int"),
        ({"env": 3}, "config.json"),
        ({"env": {"height": None}}, "config.json: env.height=None must be int"),
        ({"tuner": {"mode": "half"}}, "config.json: .*mode must be 'lora' or 'full'"),
    ],
)
def test_settings_that_cannot_be_are_told_with_their_file(settings, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message) as caught:
        load_config(tmp_path)
    assert "\n" not in str(caught.value)


# ---- a run that is killed ------------------------------------------------------------------------------


def test_checkpoints_are_written_without_being_asked_for(tmp_path, monkeypatch):
    assert TrainConfig.preset("carracing-gpu").checkpoint_minutes > 0
    config = roundless(steps=100, checkpoint_minutes=1e-6)
    monkeypatch.setattr("covr_fast.saving.CHECKPOINT_SHARE", 1e9)  # at every step, however slow the disk
    run_until_killed(Trainer(config, tmp_path), 80)
    assert 40 < Trainer(config, tmp_path, resume=True).step <= 80


def test_checkpoints_change_nothing_in_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("covr_fast.saving.CHECKPOINT_SHARE", 1.0)
    ends = []
    for minutes in (0.0, 1e-6):
        trainer = Trainer(small_config(steps=100, checkpoint_minutes=minutes), tmp_path / str(minutes))
        trainer.run()
        ends.append([*trainer.agent.actor.parameters(), *trainer.prior.backbone.base.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_checkpoints_take_a_small_share_of_the_time(tmp_path, monkeypatch):
    """However slow the disk: with one that takes 0.2 s there is none again for 10 s."""
    saves = []

    def slow(*_):
        saves.append(time.perf_counter())
        time.sleep(0.2)

    monkeypatch.setattr("covr_fast.saving.save_checkpoint", slow)
    Trainer(roundless(steps=100, checkpoint_minutes=1e-6), tmp_path).run()
    assert len(saves) == 2  # the first, and that at the end
