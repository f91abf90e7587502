"""Stored priors that are recomputed, and the VLM of a run that plays again, as a user asks for them."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import call, roundless, run_until, small_config

from covr_fast import Trainer
from covr_fast import evaluate as module
from covr_fast.audit import audit
from covr_fast.buffer import ReplayBuffer
from covr_fast.checkpoint import load_config
from covr_fast.errors import UserError
from covr_fast.evaluate import vlm_policy
from covr_fast.staleness import stored_priors


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run with rounds at steps 50 and 150, its summary, and its VLM as a policy."""
    out = tmp_path_factory.mktemp("whole")
    config = small_config(steps=180, save_replay=True, eval__vlm=True, vlm__every=2)
    config.tuner = replace(config.tuner, epochs=20, max_steps=20)  # so many that the VLM answers otherwise
    trainer = Trainer(config, out)
    return out, trainer.run(), vlm_policy(trainer.prior, config)


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "run")


def as_in_training(run):
    settings = load_config(run).eval
    return ["--episodes", str(settings.episodes), "--seed", str(settings.seed)]


@pytest.mark.parametrize(
    "options, name", [([], "vlm_after"), (["--round=2"], "vlm_after"), (["--round=0"], "vlm_before")]
)
def test_the_vlm_plays_as_the_run_measured_it(options, name, whole, monkeypatch, capsys):
    out, summary, tuned = whole
    policies, results, play = [], [], module.evaluate

    def watched(policy, *arguments, **options):
        policies.append(policy)
        results.append(play(policy, *arguments, **options))
        return results[0]

    monkeypatch.setattr(module, "evaluate", watched)
    assert call(monkeypatch, "evaluate", str(out), "--vlm-alone", *options, *as_in_training(out)) == 0
    measured = summary["evaluations"]
    assert results[0].returns.tolist() == measured[name]["returns"]
    obs = np.random.default_rng(0).integers(0, 256, (16, *load_config(out).env.obs_shape), dtype=np.uint8)
    assert (policies[0](obs) == tuned(obs)).all() == (name == "vlm_after")
    said = capsys.readouterr().out
    assert f"{measured[name]['mean']:.1f} ± {measured[name]['std']:.1f} over 2 episodes" in said
    who = "after round 2 (version 2 of its weights)" if name == "vlm_after" else "before any round (version 0"
    assert f"CarRacing-v3, VLM alone {who}" in said


@pytest.mark.parametrize(
    "options, message",
    [
        (["--vlm-alone", "--round", "3"], "has the weights after the rounds 0, 1, 2"),
        (["--vlm-alone", "--round", "-1"], "has the weights after the rounds 0, 1, 2"),
        (["--round", "1"], "--round 1 is of the VLM: add --vlm-alone"),
    ],
)
def test_rounds_that_are_not_there(options, message, whole, monkeypatch, capsys):
    assert call(monkeypatch, "evaluate", str(whole[0]), *options) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def table(said: str) -> dict[str, list[int]]:
    """The numbers of each row: stored, checked, equal, differing."""
    rows = re.findall(r"│ (version[^│]*?) +│ +(\d+) │ +(\d+) │ +(\d+) │ +(\d+) │", said)
    return {name: [int(number) for number in numbers] for name, *numbers in rows}


def test_all_priors_of_a_run_are_what_its_weights_say(whole, monkeypatch, capsys):
    assert call(monkeypatch, "audit", str(whole[0]), "--rows", "1000") == 0
    found = table(capsys.readouterr().out)
    names = ["version 0, before any round", "version 1, after round 1", "version 2, after round 2"]
    assert list(found) == names
    assert sum(stored for stored, *_ in found.values()) == pytest.approx(180 / 2, abs=4)
    for stored, checked, equal, differing in found.values():
        assert stored == checked == equal > 0
        assert differing == 0


def test_some_rows_of_all_versions_are_chosen_by_seed(whole, monkeypatch, capsys):
    chosen = []
    for seed in ("0", "0", "1"):
        assert call(monkeypatch, "audit", str(whole[0]), "--rows=20", "--seed", seed) == 0
        found = table(capsys.readouterr().out)
        assert sum(checked for _, checked, *_ in found.values()) == 20
        chosen.append(found)
    assert chosen[0] == chosen[1] != chosen[2]


def labels(run, change):
    """Changes the stored priors of a run: change(buffer, ids of those with a prior, their extras)."""
    buffer = ReplayBuffer.load(run / "checkpoint" / "replay")
    first, _, count = buffer.stream_bounds()
    ids = torch.from_numpy(buffer.span_rows(first, count)["ids"])
    ids = ids[buffer.extras(ids)["prior_version"] >= 0]
    change(buffer, ids, buffer.extras(ids))
    buffer.save(run / "checkpoint" / "replay")


def test_a_wrong_label_is_found_and_told(run, monkeypatch, capsys):
    wrong = {}

    def swap(buffer, ids, extras):
        at = int((extras["prior_version"] == 1).nonzero()[3])
        prior = extras["prior"][at].clone()
        prior[1] = -0.5 if prior[1] != -0.5 else 0.5
        wrong.update(id=int(ids[at]), prior=prior, right=extras["prior"][at])
        buffer.set_extras(ids[at : at + 1], prior=prior[None])

    labels(run, swap)
    assert call(monkeypatch, "audit", str(run), "--rows", "1000") == 1
    said = capsys.readouterr().out
    found = table(said)
    assert [differing for *_, differing in found.values()] == [0, 1, 0]

    def written(prior):
        return re.escape(f"'Action: [{', '.join(f'{number:.1f}' for number in prior.tolist())}]'")

    line = (
        rf"transition {wrong['id']}, version 1: stored {written(wrong['prior'])}, recomputed "
        rf"{written(wrong['right'])}, which is ([\d.e-]+) nats likelier at the first token that differs"
    )
    match = re.search(line.replace(r"\-0\.0", r"0\.0"), said)
    assert match, said
    assert float(match[1]) > 0, "greedy answers take the likelier token"


def test_numbers_between_the_answers_are_found(run, monkeypatch, capsys):
    """They would be rounded to the right answer."""

    def nudge(buffer, ids, extras):
        buffer.set_extras(ids[:2], prior=extras["prior"][:2] * 0.999 + 1e-3)

    labels(run, nudge)
    assert call(monkeypatch, "audit", str(run), "--rows", "1000") == 1
    assert capsys.readouterr().out.count("and no answer spells the stored numbers") == 2


def test_weights_that_are_not_those_that_gave_the_priors_are_found(run, monkeypatch, capsys):
    path = run / "checkpoint" / "adapters" / "round-1" / "model.safetensors"
    weights = load_file(path)
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        weights[name] = weight + 0.05 * torch.randn(weight.shape, generator=generator)
    save_file(weights, path, metadata={"format": "pt"})
    assert call(monkeypatch, "audit", str(run), "--rows", "1000") == 1
    found = table(capsys.readouterr().out)
    assert [differing > 0 for *_, differing in found.values()] == [False, True, False]


@pytest.mark.parametrize(
    "name, command",
    [
        ("model.safetensors", ["audit"]),
        ("config.json", ["evaluate", "--vlm-alone", "--round", "1"]),
        ("action_prior.json", ["evaluate", "--vlm-alone", "--round", "1"]),
        ("round.json", ["audit"]),
    ],
)
def test_damaged_weights_are_named(name, command, run, monkeypatch, capsys):
    path = run / "checkpoint" / "adapters" / "round-1" / name
    path.write_bytes(path.read_bytes()[:-9])
    assert call(monkeypatch, command[0], str(run), *command[1:]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert str(path.parent) in error


def test_versions_whose_weights_are_gone_are_told(run, monkeypatch, capsys):
    shutil.rmtree(run / "checkpoint" / "adapters" / "round-1")
    assert call(monkeypatch, "audit", str(run), "--rows", "1000") == 0
    found = table(capsys.readouterr().out)
    stored, checked, *_ = found["version 1, not kept"]
    assert stored > checked == 0
    assert found["version 0, before any round"][1] > 0
    labels(run, lambda buffer, ids, _: buffer.set_extras(ids, prior_version=torch.ones_like(ids)))
    assert call(monkeypatch, "audit", str(run)) == 2
    assert (
        "keeps the weights of the versions 0, 2, and its priors are of the versions 1"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"vlm__background": True, "vlm__every": 2},
        {"vlm__background": True, "vlm__refresh_priors": True, "vlm__every": 2, "vlm__max_staleness": 0},
        {"env__grayscale": False, "vlm__motion": False},
        {"vlm__motion": False},
        {"vlm__every": 1, "env__batch_size": 4},
    ],
    ids=str,
)
def test_runs_of_every_kind_that_were_interrupted(changes, tmp_path):
    trainer = Trainer(small_config(**changes), tmp_path)
    run_until(trainer, 112)
    result = audit(tmp_path, rows=1000)
    assert result.differences == []
    assert sum(version.checked for version in result.versions.values()) > 10
    assert set(result.versions) <= {0, 1}


def test_adapters_in_half_precision(tmp_path):
    """Where the base rounds, answers also depend on how LoRA is served, from before the first round on."""
    config = small_config(vlm__every=1, vlm__dtype="bfloat16")
    config.tuner = replace(config.tuner, mode="lora", lora_rank=4)
    run_until(Trainer(config, tmp_path), 112)
    result = audit(tmp_path, rows=1000)
    assert result.differences == []
    checked = [(version, each.checked == each.stored) for version, each in result.versions.items()]
    assert checked == [(0, True), (1, True)]


def test_held_priors_are_left_out(tmp_path):
    """Asked at decisions 0, 3, 6, 9 of episodes of 10."""
    trainer = Trainer(small_config(steps=120, vlm__between="hold", vlm__every=3, save_replay=True), tmp_path)
    trainer.run()
    result = audit(tmp_path, rows=1000)
    checked = sum(version.checked for version in result.versions.values())
    assert result.differences == []
    assert 120 / 10 < checked < 120 / 2  # of four in ten that were asked; some answers repeat the one before
    assert checked + result.held == len(stored_priors(trainer.buffer)[0]) > 2 * checked


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "holds no replay buffer, so no priors: audit a run that was interrupted, or .* --save-replay"),
        ({"vlm__temperature": 0.5, "save_replay": True}, "only greedy priors"),
    ],
)
def test_runs_that_cannot_be_audited(changes, message, tmp_path):
    Trainer(roundless(steps=48, **changes), tmp_path).run()
    with pytest.raises(UserError, match=message) as caught:
        audit(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_run_without_priors(run):
    labels(run, lambda buffer, ids, _: buffer.set_extras(ids, prior_version=np.full(len(ids), -1)))
    with pytest.raises(UserError, match="holds no priors: its replay buffer has 180 transitions without one"):
        audit(run)


@pytest.mark.parametrize(
    "arguments, message",
    [(["--rows", "0"], "--rows 0 must be at least 1"), (["--seed", "-1"], "--seed -1 must be at least 0")],
)
def test_wrong_arguments(arguments, message, whole, monkeypatch, capsys):
    assert call(monkeypatch, "audit", str(whole[0]), *arguments) == 2
    assert message in capsys.readouterr().err
