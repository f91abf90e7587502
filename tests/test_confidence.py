"""covr.confidence: the VLM's confidence weights its priors, in the step, held and in the background."""

import json
from dataclasses import replace

import pytest
import torch
from small_runs import roundless, run_until, small_config
from test_overlap import label_all_before_the_end

from covr_fast import Trainer
from covr_fast.agents import Guidance
from covr_fast.agents.guidance import prior_loss
from covr_fast.agents.networks import ActorSample
from covr_fast.rounds import vlm_images


def trained(folder, config) -> tuple[Trainer, torch.Tensor]:
    """A trainer after its run, and the ids of its transitions."""
    trainer = Trainer(config, folder)
    if trainer.vlm.labeller is not None:
        label_all_before_the_end(trainer)
    trainer.run()
    return trainer, torch.unique(trainer.buffer.sample(4000).index)


def logged(folder) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["prior_confidence"] for line in lines if "prior_confidence" in line]


@pytest.mark.parametrize("background", [False, True])
def test_weights_are_what_the_vlm_says_of_the_frames(tmp_path, background):
    config = roundless(steps=80, covr__confidence=True, vlm__background=background)
    trainer, ids = trained(tmp_path, config)
    weight = trainer.buffer.extras(ids)["prior_mask"]
    asked = weight > 0
    answers = trainer.prior(vlm_images(config, trainer.buffer, ids[asked]), confidence=True)
    torch.testing.assert_close(weight[asked], answers.confidence, rtol=0, atol=1e-5)
    assert 0.1 < asked.float().mean() < 0.3  # every fifth
    assert weight.max() < 1
    means = logged(tmp_path)
    assert means
    assert all(weight[asked].min() <= mean <= weight[asked].max() for mean in means)


def test_a_held_prior_keeps_its_weight(tmp_path):
    config = roundless(steps=60, covr__confidence=True, vlm__between="hold")
    trainer, ids = trained(tmp_path, config)
    extras = trainer.buffer.extras(ids)
    held = extras["prior_mask"] > 0
    pairs = torch.cat((extras["prior"], extras["prior_mask"][:, None]), 1)[held]
    answers, weights = pairs.unique(dim=0), pairs[:, 2].unique()
    assert len(answers) == len(weights), "an answer comes with its own weight"
    assert len(pairs) > 2 * len(answers), "which several transitions share"


def test_off_every_answer_weighs_the_same(tmp_path):
    trainer, ids = trained(tmp_path, roundless(steps=60))
    assert set(trainer.buffer.extras(ids)["prior_mask"].tolist()) == {0.0, 1.0}
    assert not logged(tmp_path)


def test_it_changes_what_the_actor_learns(tmp_path):
    """Two runs that differ in nothing else."""
    weights = []
    for confidence in (False, True):
        config = roundless(steps=60, covr__confidence=confidence, covr__cold_start=0)
        trainer, _ = trained(tmp_path / str(confidence), config)
        weights.append([p.detach().clone() for p in trainer.agent.networks.actor.parameters()])
    assert not all(map(torch.equal, *weights))


def test_the_term_of_eq_4_is_scaled_row_by_row():
    action, prior, mask = torch.rand(6, 2), torch.rand(6, 2), torch.tensor([0.0, 1.0, 0.5, 0.25, 0.0, 1.0])
    expected = ((action - prior).square().sum(1) * mask).sum() / 4  # rows that carry a prior
    sample = ActorSample(action, torch.zeros(6), action)
    torch.testing.assert_close(prior_loss(sample, prior, mask, Guidance()), expected)


def test_a_resumed_run_goes_on_with_the_same_weights(tmp_path):
    config = small_config(steps=120, covr__confidence=True)
    run_until(Trainer(config, tmp_path), 80)
    parts = Trainer(config, tmp_path, resume=True)
    stored = torch.unique(parts.buffer.sample(4000).index)
    before = parts.buffer.extras(stored)["prior_mask"]
    parts.run()
    assert torch.equal(parts.buffer.extras(stored)["prior_mask"], before)
    assert ((before > 0) & (before < 1)).any()
    after = parts.buffer.extras(torch.unique(parts.buffer.sample(4000).index))["prior_mask"]
    assert ((after == 0) | (after < 1)).all()


# ---- the likelihood of the agent's best actions ----


@pytest.mark.parametrize("overlap", [False, True])
def test_rounds_log_how_likely_the_best_actions_became(tmp_path, capsys, monkeypatch, overlap):
    config = small_config(steps=120)
    config.tuner = replace(config.tuner, overlap=overlap)
    trainer = Trainer(config, tmp_path)
    monkeypatch.setattr("covr_fast.rounds.BEST", 3)
    start, publish = trainer.vlm.tuner.start, trainer.vlm.tuner.publish
    given, expected = [], []

    def starting(images, actions, returns, *rest, **weights):
        assert len(returns) > 3
        best = returns.argsort(descending=True)[:3]
        given.append((images[best], actions[best]))
        start(images, actions, returns, *rest, **weights)

    def publishing():
        expected.append(trainer.prior.log_prob(*given[-1]).mean().item())
        version = publish()
        expected.append(trainer.prior.log_prob(*given[-1]).mean().item())
        return version

    monkeypatch.setattr(trainer.vlm.tuner, "start", starting)
    monkeypatch.setattr(trainer.vlm.tuner, "publish", publishing)
    summary = trainer.run()
    rounds = summary["rounds"]
    assert rounds
    figures = [r[f"best_log_prob_{when}"] for r in rounds for when in ("before", "after")]
    assert figures == pytest.approx(expected, abs=1e-4)
    assert figures[0] != figures[1]
    said = f"log p of best actions {figures[0]:.2f} -> {figures[1]:.2f}"
    assert said in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("round/best_log_prob_after") == figures[1] for line in lines)


def test_a_round_without_memory_for_the_likelihood(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise MemoryError("out of GPU memory while reading")

    monkeypatch.setattr("covr_fast.vlm.ActionPrior.log_prob", full)
    (record, *_) = Trainer(small_config(), tmp_path).run()["rounds"]
    assert "loss_after" in record
    assert not any("best_log_prob" in name for name in record)
    shown = " ".join(capsys.readouterr().out.split())
    assert "the likelihood of the best actions after the round is not known: out of GPU memory" in shown
