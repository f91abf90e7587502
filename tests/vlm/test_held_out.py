"""The losses that a round reports: of samples that it has not seen, and of the weights that are served."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_tuner import QUICK, colours, quick
from tiny import equal, make_nano, random_frames, seeded, weights_of

from covr_fast.vlm import ActionPrior, TunerConfig, VLMTuner
from covr_fast.vlm.finetune.objective import IGNORE, Samples
from covr_fast.vlm.finetune.split import split

CLIPS = 25


def clips(copies: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Frames, actions and episodes of 25 clips of near-copies, in which nothing says what the action is."""
    generator = seeded(seed)
    frames = torch.randint(216, (CLIPS, 3, 7, 7), dtype=torch.uint8, generator=generator)
    frames = frames.repeat_interleave(8, 2).repeat_interleave(8, 3).repeat_interleave(copies, 0)
    frames = frames + torch.randint(8, frames.shape, dtype=torch.uint8, generator=generator)
    actions = torch.randint(-20, 21, (CLIPS, 2), generator=generator) / 20
    return frames, actions.repeat_interleave(copies, 0), torch.arange(CLIPS).repeat_interleave(copies)


@torch.no_grad()
def true_nll(prior, frames, actions) -> float:
    """Mean -log p per answer token, from the logits of transformers' own forward."""
    backbone = prior.backbone
    samples = Samples.build(prior.grammar, frames, actions, torch.ones(len(frames)))
    inputs = backbone.process(prior.text, frames)
    prompt = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat((inputs["input_ids"], samples.answers), 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, samples.answers.shape[1]))
    inputs["pixel_values"] = inputs["pixel_values"].to(backbone.dtype)
    logits = backbone.model(**inputs).logits[:, prompt - 1 : -1].float()
    return F.cross_entropy(logits.flatten(0, 1), samples.labels.flatten(), ignore_index=IGNORE).item()


def test_near_copies_of_trained_frames_are_not_held_out():
    """Frame by frame, the model knows the held-out samples by heart, and nothing about new clips."""
    frames, actions, episodes = clips(6, seed=0)
    unseen_frames, unseen_actions, _ = clips(1, seed=1)
    reported, unseen = [], []
    for of in (episodes, None):
        prior = make_nano()
        config = replace(QUICK, epochs=8, batch_size=30, micro_batch=30, label_smoothing=0.0)
        tuner = VLMTuner(prior, config)
        tuner.start(frames, actions, torch.ones(len(frames)), of)
        report = tuner.poll()
        assert report.held_out == 30
        assert report.episodes == (CLIPS if of is not None else len(frames))
        tuner.publish()
        reported.append(report.loss_after)
        unseen.append(true_nll(prior, unseen_frames, unseen_actions))
    assert reported[0] == pytest.approx(unseen[0], rel=0.5)
    assert reported[1] < 0.1 * unseen[1]
    assert unseen[0] < unseen[1], "an honest loss ends the round with the better epoch"


def test_without_a_second_episode_there_is_no_loss_and_the_last_epoch_stays(nano):
    frames, actions = colours(12)
    tuner = quick(nano, epochs=1)
    before = weights_of(tuner)
    tuner.start(frames, actions, torch.linspace(0, 1, 12), torch.full((12,), 5))
    report = tuner.poll()
    assert (report.held_out, report.episodes) == (0, 1)
    assert report.loss_before != report.loss_before
    assert report.loss_after != report.loss_after
    assert not equal(before, weights_of(tuner))


def test_every_round_holds_out_the_same_episodes(nano, monkeypatch):
    """A run that is resumed does, too: nothing but the seed decides."""
    seen = []
    spied = lambda *a: seen.append(split(*a)[0].tolist()) or split(*a)  # noqa: E731
    monkeypatch.setattr("covr_fast.vlm.finetune.round.split", spied)
    frames, actions = colours(12)
    episodes, returns = torch.arange(12) // 2, torch.linspace(0, 1, 12)
    tuner = quick(nano, epochs=1)
    for _ in range(2):
        tuner.start(frames, actions, returns, episodes)
    quick(make_nano(), epochs=1, seed=4).start(frames, actions, returns, episodes)
    assert seen[0] == seen[1] != seen[2]
    assert len(seen[0]) == 2


def test_episodes_that_do_not_fit(nano):
    frames, actions = colours(4)
    for episodes in (torch.zeros(3, dtype=torch.int64), torch.zeros(4), torch.zeros(4, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"episodes must be int64 of shape \[4\], not"):
            quick(nano).start(frames, actions, torch.ones(4), episodes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_reported_losses_are_of_what_is_served(mode, dtype):
    """Before and after, against the published prior's model in transformers' own forward."""
    frames, actions = colours(60)
    prior = make_nano(dtype=dtype)
    tuner = quick(prior, mode=mode, lora_rank=4, lora_alpha=8, epochs=3, micro_batch=5)
    held_out, _ = split(torch.ones(60), torch.arange(60), QUICK.held_out, 0)
    before = true_nll(prior, frames[held_out], actions[held_out])
    tuner.start(frames, actions, torch.ones(60))
    report = tuner.poll()
    assert report.held_out == len(held_out)
    assert report.loss_after < 0.9 * report.loss_before
    tuner.publish()
    after = true_nll(prior, frames[held_out], actions[held_out])
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    assert report.loss_before == pytest.approx(before, rel=tolerance)
    assert report.loss_after == pytest.approx(after, rel=tolerance)


def test_every_backbone(opened):
    prior, frames = opened
    actions = torch.tensor([[0.1, -0.2], [1.0, 0.0], [-1.0, 0.55], [0.3, 0.3]])
    config = TunerConfig(mode="lora", lora_rank=2, epochs=1, held_out=0.5, micro_batch=2, learning_rate=1e-2)
    tuner = VLMTuner(prior, config)
    held_out, _ = split(torch.ones(4), torch.arange(4), 0.5, 0)
    before = true_nll(prior, frames[held_out], actions[held_out])
    tuner.start(frames, actions, torch.ones(4))
    report = tuner.poll()
    tuner.publish()
    assert report.loss_before == pytest.approx(before, rel=1e-4)
    if report.loss_after != report.loss_before:
        after = true_nll(prior, frames[held_out], actions[held_out])
        assert report.loss_after == pytest.approx(after, rel=1e-4)


def test_images_of_one_size(nano):
    """Frames that the vision tower sees in many tokens."""
    frames, actions = random_frames((84, 84), 6), colours(6)[1]
    tuner = quick(nano, mode="lora", lora_rank=2, epochs=1, held_out=0.4)
    held_out, _ = split(torch.ones(6), torch.arange(6), 0.4, 0)
    before = true_nll(nano, frames[held_out], actions[held_out])
    tuner.start(frames, actions, torch.ones(6))
    assert tuner.poll().loss_before == pytest.approx(before, rel=1e-5)


def test_the_prior_opened_again_gives_the_same_losses(tmp_path):
    """A bfloat16 prior with LoRA, saved and opened: the adapters are served beside the base in both."""
    frames, actions = colours(30)
    prior = make_nano(dtype=torch.bfloat16)
    tuner = quick(prior, mode="lora", lora_rank=4, epochs=2)
    tuner.start(frames, actions, torch.ones(30))
    tuner.publish()
    prior.save_pretrained(tmp_path / "saved")
    again = ActionPrior.from_pretrained(tmp_path / "saved", action_dim=2, device="cpu")
    assert torch.equal(prior(frames).token_ids, again(frames).token_ids)
    assert true_nll(prior, frames, actions) == true_nll(again, frames, actions)
