"""The VLM beside the loop: rounds and priors that overlap with acting lose, repeat and delay nothing."""

import json
import threading
from dataclasses import replace

import pytest
import torch
from small_runs import at_each_step, roundless, run_until, small_config
from torch.testing import assert_close

from covr_fast import Trainer
from covr_fast.errors import UserError
from covr_fast.rounds import vlm_images
from covr_fast.vlm import VLMTuner


def overlapped(**changes):
    config = small_config(**changes)
    config.tuner = replace(config.tuner, overlap=True)
    return config


def wait_with_rounds(patch: pytest.MonkeyPatch, trainer: Trainer, step: int) -> None:
    """A round does not begin its work before the run is at `step`."""
    gate, train = threading.Event(), VLMTuner._train

    def gated(tuner, samples):
        assert gate.wait(60)
        return train(tuner, samples)

    patch.setattr(VLMTuner, "_train", gated)
    at_each_step(trainer, lambda _rows: gate.set() if trainer.step == step else None)


def label_all_before_the_end(trainer: Trainer) -> None:
    """Lets the labeller write all labels that are due in the last step."""

    def drain(_rows):
        while trainer.step == trainer.config.steps and len(trainer.vlm.labeller):
            trainer.vlm.labeller.step()

    at_each_step(trainer, drain)


def test_publishing_at_a_fixed_step_makes_reruns_bit_identical(tmp_path):
    runs = []
    for name in ("first", "second"):
        trainer = Trainer(overlapped(steps=120, covr__publish_after=20), tmp_path / name)
        runs.append((trainer, trainer.run()))
    (first, summary), (second, _) = runs
    assert json.loads((tmp_path / "first/summary.json").read_text())["rounds"] == summary["rounds"]
    assert [(r["step"], r["published"]) for r in summary["rounds"]] == [(50, 70)]
    for a, b in ((first.agent, second.agent), (first.prior.backbone.model, second.prior.backbone.model)):
        assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)
    assert first.counters.returns == second.counters.returns


def test_a_round_that_is_running_when_the_steps_end_is_still_published(tmp_path):
    summary = Trainer(overlapped(steps=56), tmp_path).run()
    assert [r["step"] for r in summary["rounds"]] == [50]
    assert summary["rounds"][0]["loss_after"] > 0


def test_the_loop_goes_on_while_a_round_runs(tmp_path, monkeypatch):
    trainer = Trainer(overlapped(steps=100), tmp_path)
    wait_with_rounds(monkeypatch, trainer, 90)
    (done,) = trainer.run()["rounds"]
    assert done["step"] == 50
    assert done["published"] >= 90


def test_frames_that_the_ring_overwrites_during_a_round_are_still_those_it_trains_on(tmp_path):
    """A ring of 60 transitions is overwritten whole while the round of step 50 waits to begin."""
    weights = []
    for begins in (50, 130):
        # No guidance, so that the two runs collect the same data.
        config = overlapped(steps=148, replay__capacity=60, covr__publish_after=90, covr__cold_start=9)
        trainer = Trainer(config, tmp_path / str(begins))
        with pytest.MonkeyPatch.context() as patch:
            wait_with_rounds(patch, trainer, begins)
            (done,) = trainer.run()["rounds"]
        assert (done["step"], done["published"]) == (50, 140)
        weights.append(trainer.prior.backbone.model.state_dict())
    assert_close(*weights, rtol=0, atol=0)


def test_an_error_in_the_round_ends_the_run_within_a_step(tmp_path, monkeypatch):
    def broken(tuner, samples):
        raise FloatingPointError("the round broke")

    monkeypatch.setattr(VLMTuner, "_train", broken)
    trainer = Trainer(overlapped(steps=160, covr__publish_after=100), tmp_path)

    def wait_for_the_thread(_rows):
        if trainer.vlm.tuner._thread is not None:
            trainer.vlm.tuner._thread.join()

    at_each_step(trainer, wait_for_the_thread)
    with pytest.raises(FloatingPointError, match="the round broke"):
        trainer.run()
    assert trainer.step <= 50 + 2 * trainer.config.env.batch_size
    resumed = Trainer(trainer.config, tmp_path, resume=True)  # and nothing is lost
    assert (resumed.step, len(resumed.buffer)) == (trainer.step, len(trainer.buffer))
    assert len(resumed.vlm.rounds.finished) >= 40


def test_a_full_gpu_is_a_message_and_the_run_is_saved(tmp_path, monkeypatch):
    def full(tuner, samples):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(VLMTuner, "_train", full)
    trainer = Trainer(small_config(steps=60), tmp_path)
    with pytest.raises(UserError, match="out of GPU memory while fine-tuning: lower micro_batch"):
        trainer.run()
    assert Trainer(trainer.config, tmp_path, resume=True).step == 50


def test_a_round_that_an_interrupt_cuts_off_is_done_again_by_the_resumed_run(tmp_path):
    config = overlapped(steps=100, covr__publish_after=40)
    first = Trainer(config, tmp_path)
    run_until(first, 60)
    assert not first.vlm.tuner.running

    second = Trainer(config, tmp_path, resume=True)
    assert second.vlm.rounds.schedule.rounds == 0
    assert second.vlm.tuner.rounds == 0
    # The 40 samples of the round that was dropped, and the 20 of the episodes that were cut.
    assert len(second.vlm.rounds.finished) == 60
    (done,) = second.run()["rounds"]
    assert done["samples"] == 60


def test_background_labels_reach_every_due_transition(tmp_path):
    trainer = Trainer(roundless(steps=120, vlm__background=True), tmp_path)
    label_all_before_the_end(trainer)
    trainer.run()
    batch = trainer.buffer.sample(2000)
    share = batch.extras["prior_mask"].mean().item()
    # Asked at decisions 0, 5 of episodes of 10.
    assert share == pytest.approx(0.2, abs=0.05)
    asked = batch.extras["prior_mask"].bool()
    ids = batch.index[asked]
    assert torch.equal(
        batch.extras["prior"][asked], trainer.prior(vlm_images(trainer.config, trainer.buffer, ids)).action
    )
    assert (batch.extras["prior_version"] == torch.where(asked, 0, -1)).all()
    assert trainer.vlm.labeller.dropped == 0


def test_the_simulation_never_waits_for_a_background_prior(tmp_path, monkeypatch):
    gate = threading.Event()
    trainer = Trainer(roundless(steps=100, vlm__background=True), tmp_path)
    call = type(trainer.prior).__call__

    def gated(prior, images, **options):
        assert gate.wait(60)
        return call(prior, images, **options)

    monkeypatch.setattr(type(trainer.prior), "__call__", gated)

    at_each_step(trainer, lambda _rows: gate.set() if trainer.step >= 98 else None)
    assert trainer.run()["steps"] == 100


def test_refreshed_priors_are_of_the_published_version(tmp_path):
    trainer = Trainer(small_config(steps=150, vlm__background=True, vlm__refresh_priors=True), tmp_path)
    label_all_before_the_end(trainer)
    trainer.run()
    batch = trainer.buffer.sample(2000)
    assert trainer.prior.version == 2
    assert set(batch.extras["prior_version"].tolist()) == {-1, 2}
