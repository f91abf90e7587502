"""When the VLM begins to guide, in whole small runs: rounds that tuned nothing do not count."""

import numpy as np
import pytest
from small_runs import call, run_until, small_config

from covr_fast import Trainer
from covr_fast.checkpoint import Checkpoint
from covr_fast.files import read_records
from covr_fast.report import read_metrics, read_summary


def without_rewards(trainer: Trainer, until: int) -> Trainer:
    """Every reward before the step `until` is zero, as where a task is not understood yet."""
    recv = trainer.envs.recv

    def silent():
        rows = recv()
        return rows._replace(reward=np.zeros_like(rows.reward)) if trainer.step < until else rows

    trainer.envs.recv = silent
    return trainer


def cold_config(**changes):
    """Rounds at steps 20, 60 and 120."""
    made = {"steps": 140, "covr__psi_0": 20, "env__max_episode_steps": 4, "vlm__every": 2, "log_every": 10}
    return small_config(**(made | changes))


def guided_steps(run) -> dict[int, bool]:
    return {m["step"]: bool(m["guided"]) for m in read_metrics(run) if "guided" in m}


@pytest.fixture(scope="module")
def late(tmp_path_factory):
    """A run whose first two rounds found no reward; its first tuned round is the third."""
    out = tmp_path_factory.mktemp("late")
    trainer = without_rewards(Trainer(cold_config(), out), until=64)
    trainer.run()
    return trainer, out


def test_rounds_without_rewards_end_no_cold_start(late):
    trainer, out = late
    records = read_summary(out)["rounds"]
    assert [r["step"] for r in records] == [20, 60, 120], "the schedule changed"
    assert [r.get("version") for r in records] == [None, None, 1]
    assert [r["tuned_rounds"] for r in records] == [0, 0, 1]
    assert [r["kept"] for r in records[:2]] == [0, 0]
    assert guided_steps(out) == {step: step >= 120 for step in range(10, 150, 10)}
    assert trainer.vlm.rounds.tuned == 1


def test_a_run_without_any_reward_never_guides(tmp_path, capsys):
    trainer = without_rewards(Trainer(cold_config(steps=80), tmp_path), until=999)
    trainer.run()
    assert trainer.vlm.rounds.schedule.rounds == 2
    assert not any(guided_steps(tmp_path).values())
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("nothing was tuned, so it does not count towards covr.cold_start") == 2
    assert not any("prior_loss" in m for m in read_metrics(tmp_path))


def test_a_resumed_run_knows_which_rounds_tuned(tmp_path):
    config = cold_config()
    run_until(without_rewards(Trainer(config, tmp_path), until=64), 100)
    second = Trainer(config, tmp_path, resume=True)
    assert second.vlm.rounds.schedule.rounds == 2
    assert (second.vlm.rounds.tuned, second.vlm.rounds.guiding) == (0, False)
    second.run()
    assert (second.vlm.rounds.tuned, second.vlm.rounds.guiding) == (1, True)


def test_what_reads_the_rounds_tells_those_that_tuned(late, monkeypatch, capsys):
    """Model card, evaluation of a round, transcript, summary and curves."""
    trainer, out = late
    kept = trainer.vlm.rounds.records[-1]["kept"]
    card = (out / "checkpoint" / "vlm" / "README.md").read_text()
    expected = f"- Rounds: 1, on {kept:.0f} samples of the agent's own that the filter kept"
    assert f"{expected}, 2 more found nothing to learn from" in card
    assert [(w.number, w.version) for w in Checkpoint(out).rounds(trainer.config)] == [(0, 0), (3, 1)]
    assert call(monkeypatch, "evaluate", str(out), "--vlm-alone", "--round=2", "--episodes=1") == 2
    assert "after the rounds 0, 3 (0: before any)" in capsys.readouterr().err
    assert {r["version"] for r in read_records(out / "answers.jsonl")[0]} == {0, 1}
    assert call(monkeypatch, "report", str(out), "--out", str(out / "report.html")) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("│     2 "))
    assert row.replace("│", " ").split()[-4:] == ["-"] * 4, "a round that tuned nothing has figures of tuning"


def test_the_guidance_is_logged_from_the_cold_starts_end_on(tmp_path):
    """With a prior for every decision, all sampled rows but those of the cold start carry one."""
    config = cold_config(vlm__every=1, covr__trust_from="start", steps=100)
    Trainer(config, tmp_path).run()
    lines = [m for m in read_metrics(tmp_path) if "q" in m]
    assert [("guided_share" in m) for m in lines] == [m["step"] > 20 for m in lines]
    logged = [m for m in lines if "guided_share" in m]
    assert {m["guided_share"] for m in logged} == {1.0}
    for m in logged:
        assert m["prior_distance"] == pytest.approx(m["prior_loss"])
        assert m["prior_loss"] > 0
        assert m["prior_to_q"] > 0


@pytest.mark.parametrize("setting, value", [("normalise", "batch"), ("distance", "mean")])
def test_the_form_of_eq_4_reaches_the_agent_and_may_change_when_a_run_goes_on(setting, value, tmp_path):
    config = cold_config(steps=40, save_replay=True)
    first = Trainer(config, tmp_path)
    assert getattr(first.agent.guidance, setting) != value
    first.run()
    setattr(config.covr, setting, value)
    config.steps = 60
    second = Trainer(config, tmp_path, resume=True)
    assert getattr(second.agent.guidance, setting) == value
    second.run()


def test_the_entropy_of_eq_5_is_logged_in_both_forms(tmp_path):
    figures = {}
    for form in ("sum", "mean"):
        config = cold_config(steps=30, covr__entropy=form)
        Trainer(config, tmp_path / form).run()
        (line,) = (m for m in read_metrics(tmp_path / form) if "round/entropy" in m)
        figures[form] = line
        nats = line["round/entropy"] / (1 if form == "sum" else 2)
        assert line["round/iqr_coefficient"] == pytest.approx(1 / (1 + np.exp(nats)))
        assert line["round/entropy_per_number"] == line["round/entropy"] / 2
    assert figures["sum"]["round/entropy"] == figures["mean"]["round/entropy"]
    assert figures["sum"]["round/tau"] != figures["mean"]["round/tau"]
