"""Whole small runs of the methods: who acts, what is loaded and tuned, and what a run folder then holds."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from small_runs import FLAGS, call, run_until, small_config

from covr_fast import Trainer, load_policy
from covr_fast.checkpoint import Checkpoint, load_config
from covr_fast.commands.common import spelled_out
from covr_fast.errors import UserError
from covr_fast.files import read_records
from covr_fast.judge import VLMJudge
from covr_fast.methods import METHODS
from covr_fast.report import read_metrics, read_summary
from covr_fast.rounds import vlm_images


def run_of(method: str, out, **changes) -> tuple[Trainer, dict]:
    config = small_config(**({"log_every": 20, "eval__vlm": True} | changes))
    METHODS[method].change(config)
    config.method = method
    trainer = Trainer(config, out)
    return trainer, trainer.run()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_by_its_name(method, monkeypatch, capsys, tmp_path):
    out = tmp_path / "run"
    assert call(monkeypatch, "train", "carracing", *FLAGS, "--method", method, "--out", str(out)) == 0
    shown = capsys.readouterr().out
    assert METHODS[method].summary in shown or method == "covr"
    config, summary = load_config(out), read_summary(out)
    assert (config.method, summary["method"], summary["preset"]) == (method, method, "carracing")
    assert ("actor" in summary["evaluations"]) == config.has_agent
    assert ("vlm_before" in summary["evaluations"]) == config.has_vlm
    assert ("vlm_after" in summary["evaluations"]) == config.has_rounds
    assert bool(summary["rounds"]) == config.has_rounds
    assert (out / "checkpoint" / "agent.pt").exists() == config.has_agent
    assert (out / "checkpoint" / "vlm").exists() == config.has_rounds
    assert (out / "episode.mp4").exists() or (out / "episode.gif").exists()
    capsys.readouterr()

    alone = [] if config.has_agent else ["--vlm-alone"]
    assert call(monkeypatch, "evaluate", str(out), "--episodes", "2", "--json", *alone) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["policy"] == ("actor" if config.has_agent else "vlm")
    assert [each["seed"] for each in told["episodes"]] == [2_000_000, 2_000_001]
    assert np.mean([each["return"] for each in told["episodes"]]) == pytest.approx(told["mean"])


def test_covr_off_loads_no_vlm_and_spends_nothing_on_one(tmp_path):
    code = (
        "import sys; from covr_fast.commands import train;"
        f"train.main(['carracing', *{FLAGS!r}, '--covr', 'off', '--out', {str(tmp_path / 'run')!r}]);"
        "loaded = {'transformers', 'peft', 'safetensors'} & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    summary = read_summary(tmp_path / "run")
    assert summary["method"] == "off"
    assert not {"prior", "fine-tuning"} & summary["time_shares"].keys()
    assert not (tmp_path / "run" / "prompt.txt").exists()
    assert not (tmp_path / "run" / "answers.jsonl").exists()


def weights_of(run) -> list[float]:
    return [m["prior_weight"] for m in read_metrics(run) if "prior_weight" in m]


def test_a_frozen_vlm_guides_from_the_start_with_a_constant_weight(tmp_path):
    trainer, summary = run_of("dpl", tmp_path, agent__prior_weight=0.5)
    assert (trainer.prior.version, summary["rounds"]) == (0, [])
    assert trainer.vlm.tuner is None
    assert all(m["guided"] for m in read_metrics(tmp_path) if "guided" in m)
    assert any("prior_loss" in m for m in read_metrics(tmp_path))
    assert trainer.agent.prior_weight == 0.5
    assert weights_of(tmp_path) == []
    assert not (tmp_path / "rounds").exists()


def test_an_annealed_weight_falls_linearly_to_zero(tmp_path):
    trainer, _ = run_of("apl", tmp_path, agent__prior_weight=0.5)
    steps = range(20, 161, 20)
    assert weights_of(tmp_path) == pytest.approx([0.5 * (1 - step / 160) for step in steps])
    assert trainer.agent.prior_weight == 0


def test_the_weight_of_the_term_is_the_one_of_the_step(tmp_path, monkeypatch):
    config = small_config(covr__decay=0.5, covr__cold_start=0, agent__prior_weight=2.0, steps=120)
    trainer = Trainer(config, tmp_path)
    update, seen = trainer.agent.update, []

    def watched(batch, *, guide):
        seen.append((trainer.step, float(trainer.agent.prior_weight)))
        return update(batch, guide=guide)

    monkeypatch.setattr(trainer.agent, "update", watched)
    trainer.run()
    assert len(seen) > 5
    for step, weight in seen:
        assert weight == pytest.approx(2 * max(0, 1 - step / 60), abs=1e-6)


def test_the_vlm_alone_takes_no_steps(tmp_path):
    trainer, summary = run_of("vbe", tmp_path, eval__vlm=False)
    assert (summary["steps"], summary["updates"], summary["policy"]) == (0, 0, "vlm_before")
    assert trainer.evaluations.results.keys() == {"random", "vlm_before"}
    with pytest.raises(UserError, match="add --vlm-alone"):
        load_policy(tmp_path)


def test_as_the_policy_the_vlm_acts_explores_and_is_tuned(tmp_path):
    trainer, summary = run_of("vpf", tmp_path)
    assert (summary["updates"], summary["policy"]) == (0, "vlm_after")
    assert trainer.prior.version >= 1
    ids = torch.arange(len(trainer.buffer))
    actions = trainer.buffer.actions(ids[trainer.buffer.contains(ids)])
    assert torch.allclose(actions, (10 * actions).round() / 10), "an action that the VLM cannot have said"
    assert len(actions.unique(dim=0)) > 20, "it does not explore"
    most = 2 * np.log(2)  # nats of a uniform density over [-1, 1]^2
    assert all(-10 < record["entropy"] < most + 0.1 for record in summary["rounds"])


def test_the_entropy_of_a_vlm_that_acts_is_that_of_its_answers_as_a_density(tmp_path):
    trainer, _ = run_of("vpf", tmp_path, steps=40)  # no round yet
    prior, buffer = trainer.prior, trainer.buffer
    ids = torch.arange(16)
    found = VLMJudge(trainer.config, prior, buffer).entropy(ids)
    images = vlm_images(trainer.config, buffer, ids)
    generator, surprise = torch.Generator().manual_seed(0), []
    for _ in range(12):
        answer = prior(images, temperature=1.0, generator=generator)
        surprise.append(-prior.log_prob(images, answer.action).mean().item())
    cell = 0.1**2  # the grid has tenths
    assert found.item() == pytest.approx(np.mean(surprise) + np.log(cell), abs=0.3)


@pytest.mark.parametrize("method", ["off", "dpl", "vpf", "m10"])
def test_a_run_of_another_method_is_resumed(method, tmp_path):
    config = small_config(save_replay=True)
    METHODS[method].change(config)
    config.method = method
    run_until(Trainer(config, tmp_path), 80)
    assert Checkpoint(tmp_path).counters["step"] == 80
    resumed = Trainer(load_config(tmp_path), tmp_path, resume=True)
    assert resumed.step == 80
    assert resumed.run()["steps"] == 160
    steps = [record["step"] for record in read_records(tmp_path / "evaluations.jsonl")[0]]
    assert steps == sorted(steps)


def test_a_run_cannot_change_its_method(tmp_path):
    run_until(Trainer(small_config(begun_as="carracing"), tmp_path), 80)
    for change, said in (
        ({"method": "m1"}, "begun with method=covr"),
        ({"method": "off", "covr__vlm": "off"}, "begun with (method=covr|covr.vlm=tuned)"),
        ({"method": "vpf", "covr__decides": "vlm"}, "begun with (method=covr|covr.decides=agent)"),
    ):
        with pytest.raises(UserError, match=said):
            Trainer(small_config(begun_as="carracing", **change), tmp_path, resume=True)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"covr__decides": "vlm", "covr__vlm": "off"}, "covr.vlm='off' loads none"),
        ({"method": "dpl", "covr__vlm": "frozen", "covr__cold_start": 2}, "set covr.cold_start=0"),
        ({"method": "vpf", "covr__decides": "vlm", "covr__score": "q"}, "no agent is trained"),
        ({"method": "vpf", "covr__decides": "vlm", "covr__bootstrap": True}, "no agent is trained"),
        ({"method": "vpf", "covr__decides": "vlm", "vlm__background": True}, "leave vlm.background"),
        ({"covr__vlm": "off"}, "not what method='covr' is: .* off, per, ere, m10, m11"),
        ({"method": "off"}, "covr.vlm='tuned' .* not what method='off' is: .* covr, m1, "),
        ({"covr__vlm": "frozen", "covr__cold_start": 0}, "give a method that has them: dpl, apl"),
        ({"method": "vbe", "covr__decides": "vlm"}, "a method that has them: vpf"),
        ({"covr__decay": 1.5}, "covr.decay=1.5 must be a share"),
        ({"covr__top_share": 0.0}, "covr.top_share=0.0 must be above 0"),
        ({"replay__best_share": 1.2}, "replay.best_share=1.2 must be above 0 and at most 1"),
        ({"method": "dlp"}, "did you mean dpl"),
    ],
)
def test_roles_that_do_not_fit_together_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        small_config(**change).check()


def test_the_vlm_is_evaluated_after_each_round_if_asked_for(tmp_path):
    _, summary = run_of("covr", tmp_path, eval__rounds=True)
    records, torn = read_records(tmp_path / "evaluations.jsonl")
    by_policy = [record["policy"] for record in records]
    assert not torn
    assert by_policy.count("vlm") == len(summary["rounds"]) >= 2
    assert by_policy[0] == "random"
    for record in records:
        assert len(record["returns"]) == 2
    actor = summary["evaluations"]["actor"]["returns"]
    assert [record["returns"] for record in records if record["policy"] == "actor"][-1] == actor
    means = [m["eval/vlm_mean"] for m in read_metrics(tmp_path) if "eval/vlm_mean" in m]
    assert means == [np.mean(record["returns"]) for record in records if record["policy"] == "vlm"]


def test_what_a_round_selected_is_on_disk(tmp_path):
    trainer, summary = run_of("covr", tmp_path)
    record = summary["rounds"][0]
    with np.load(tmp_path / "rounds" / "round-1.npz") as file:
        saved = dict(file)
    assert len(saved["returns"]) == record["samples"] == len(saved["time"]) == len(saved["episode"])
    assert len(saved["kept"]) == record["kept"] == len(saved["weights"])
    assert (saved["returns"][saved["kept"]] > saved["cutoff"]).all()
    dropped = np.delete(saved["returns"], saved["kept"])
    assert (dropped <= saved["cutoff"] + 1e-6).all()
    assert (saved["weights"] > 0).mean() == pytest.approx(record["nonzero_share"])
    at, kept = saved["frame_at"], np.isin(saved["frame_at"], saved["kept"])
    assert kept.tolist() == sorted(kept.tolist(), reverse=True), "kept ones come first"
    for shown in (at[kept], at[~kept]):
        assert (np.diff(saved["returns"][shown]) >= 0).all()
        assert len(np.unique(shown)) == len(shown)
    height, width = trainer.config.env.height, trainer.config.env.width
    assert saved["frames"].shape == (len(at), 3, height, width)
    assert saved["frames"].dtype == np.uint8


def test_the_distance_of_priors_to_actions_is_logged(tmp_path):
    run_of("covr", tmp_path / "step")
    run_of("covr", tmp_path / "background", vlm__background=True)
    for name in ("step", "background"):
        found = [m["prior_to_action"] for m in read_metrics(tmp_path / name) if "prior_to_action" in m]
        assert found
        assert all(0 < value <= 8 for value in found)


def test_commands_that_need_a_tuned_vlm_say_that_there_is_none(monkeypatch, capsys, tmp_path):
    for method in ("off", "dpl"):
        run_of(method, tmp_path / method, save_replay=True)
        assert call(monkeypatch, "push", str(tmp_path / method), "me/it", "--dry-run") == 2
        assert f"tuned no VLM (its method is {method})" in capsys.readouterr().err
    assert call(monkeypatch, "audit", str(tmp_path / "off")) == 2
    assert "has no VLM (covr.vlm='off')" in capsys.readouterr().err
    assert call(monkeypatch, "audit", str(tmp_path / "dpl")) == 0, "a frozen VLM gives its priors again"
    assert call(monkeypatch, "evaluate", str(tmp_path / "off"), "--vlm-alone") == 2
    assert "has no VLM" in capsys.readouterr().err
    assert call(monkeypatch, "evaluate", str(tmp_path / "dpl"), "--vlm-alone", "--round", "1") == 2
    assert "has the weights after the rounds 0" in capsys.readouterr().err
    assert call(monkeypatch, "doctor", "carracing", "--vlm.model", "nano", "--covr", "off") == 2
    assert "loads no VLM, so there is nothing to fit" in capsys.readouterr().err


def test_two_methods_at_once_are_refused(monkeypatch, capsys):
    for flags in (["--covr", "off", "--method", "dpl"], ["--method=m1", "--covr=off"]):
        assert call(monkeypatch, "train", "racetrack", *flags) == 2
        assert "--covr off is --method off: leave it out, or --method " in capsys.readouterr().err
    assert spelled_out(["--covr", "off", "--method", "off"]) == ["--method", "off", "--method", "off"]


def test_memory_and_times_are_of_who_works(monkeypatch, capsys):
    def fits(*flags: str) -> dict:
        call(monkeypatch, "doctor", "carracing", "--vlm.model", "nano", "--json", *flags)
        return json.loads(capsys.readouterr().out)

    def parts(*flags: str) -> str:
        assert call(monkeypatch, "bench", "carracing", "--seconds", "0.05", *FLAGS, *flags) == 0
        return capsys.readouterr().out

    tuned, frozen, alone = fits(), fits("--method", "dpl"), fits("--method", "vbe")
    owners = ["the VLM, to answer", "a round of fine-tuning", "the agent", "besides"]
    assert list(tuned["parts"]) == owners
    assert list(frozen["parts"]) == [owners[0], *owners[2:]]
    names = [part["name"] for part in alone["parts"]["the agent"]]
    assert names == ["replay buffer"], "no agent is trained"
    assert tuned["rounds_in_turn"] > frozen["rounds_in_turn"] > alone["rounds_in_turn"]
    for method, has in {
        "covr": ("prior", "acting", "policy update", "fine-tuning"),
        "off": ("acting", "policy update"),
        "dpl": ("prior", "acting", "policy update"),
        "vpf": ("prior", "fine-tuning"),
    }.items():
        shown = parts("--method", method)
        for part in ("prior", "acting", "policy update", "fine-tuning"):
            assert (f"│ {part} " in shown) == (part in has), (method, part)
        assert "a whole run of" in shown
