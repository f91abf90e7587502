"""The size of the frames as the VLM sees them: the same for every part that looks at frames."""

import json
import threading

import pytest
import torch
from test_resample import pillow
from tiny import ACTIONS, frames_for, make_nano, open_prior, random_frames, seeded

from covr_fast import TrainConfig, ops
from covr_fast.errors import UserError
from covr_fast.vlm import ActionPrior, TunerConfig, VLMTuner
from covr_fast.vlm.finetune.objective import AnswerModel, RoundImages, Samples
from covr_fast.vlm.model.resample import BICUBIC

LARGE = 112


def open_large(model) -> ActionPrior:
    return ActionPrior.from_pretrained(model, action_dim=2, prompt="Drive.", device="cpu", image_size=LARGE)


def same(ours: ActionPrior, theirs: ActionPrior, frames: torch.Tensor) -> bool:
    return torch.equal(ours(frames).token_ids, theirs(frames).token_ids)


def test_fast_path_equals_generate(checkpoint):
    prior, frames = open_large(checkpoint), frames_for(checkpoint)
    for temperature in (0.0, 1.0):
        fast = prior(frames, temperature=temperature, generator=seeded(1))
        slow = prior.reference(frames, temperature=temperature, generator=seeded(1))
        assert torch.equal(fast.token_ids, slow.token_ids)
    size = tuple(frames.shape[2:])
    more, fewer = (len(p.layout(size).image_at) for p in (prior, open_prior(checkpoint)))
    fixed = checkpoint.name in ("llava", "smolvlm")  # their towers have one input size
    assert more == fewer if fixed else more > fewer


@pytest.mark.parametrize(("old", "new"), [((60, 84), (80, 112)), ((84, 60), (112, 80)), ((224, 3), (112, 2))])
def test_frames_keep_their_aspect_and_are_resized_as_by_pillow(shared_nano, old, new):
    frames = random_frames(old, 2)
    backbone = shared_nano.backbone.with_model(shared_nano.backbone.model)
    assert backbone.seen(frames) is frames
    backbone.image_size = LARGE
    assert torch.equal(backbone.seen(frames), pillow(frames, [new], BICUBIC))


def test_it_is_saved_and_may_be_overridden(tmp_path, frames):
    prior = make_nano(image_size=LARGE)
    prior.save_pretrained(tmp_path)
    again = ActionPrior.from_pretrained(tmp_path, action_dim=2, device="cpu")
    assert again.image_size == LARGE
    assert same(again, prior, frames)
    as_they_are = ActionPrior.from_pretrained(tmp_path, action_dim=2, device="cpu", image_size=0)
    assert as_they_are.image_size == 0
    assert same(as_they_are, make_nano(), frames)
    assert not same(as_they_are, prior, frames)


def test_a_prior_saved_without_it_shows_frames_as_they_are(tmp_path, nano, frames):
    nano.save_pretrained(tmp_path)
    file = tmp_path / "action_prior.json"
    settings = json.loads(file.read_text())
    del settings["image_size"]
    file.write_text(json.dumps(settings))
    assert ActionPrior.from_pretrained(tmp_path, action_dim=2, device="cpu").image_size == 0


def test_it_may_be_set_between_answers(nano, frames):
    nano(frames)
    weights = nano._weights
    nano.image_size = LARGE
    assert same(nano, make_nano(image_size=LARGE), frames)
    assert nano._weights is weights, "merged weights do not depend on the size of frames"
    assert torch.equal(nano(frames).token_ids, nano.reference(frames).token_ids)
    assert nano.settings.image_size == LARGE
    nano.image_size = 0
    assert same(nano, make_nano(), frames)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_round_sees_the_frames_as_the_prior_does(checkpoint, mode, monkeypatch):
    prior, frames = open_large(checkpoint), frames_for(checkpoint)
    config = TunerConfig(mode=mode, lora_rank=4, epochs=4, batch_size=4, micro_batch=4, learning_rate=3e-3)
    tuner = VLMTuner(prior, config)
    seen = []
    for cls in type(prior.backbone).__mro__[:-1]:
        if "image_features" in vars(cls):
            features = cls.image_features
            monkeypatch.setattr(
                cls, "image_features", lambda self, x, f=features: seen.append(self.image_size) or f(self, x)
            )
    tuner.start(frames.repeat(3, 1, 1, 1), torch.full((12, 2), 0.5), torch.ones(12))
    report = tuner.poll()
    assert report.loss_after < report.loss_before
    assert set(seen) == {LARGE}
    tuner.publish()
    assert torch.equal(prior(frames).token_ids, prior.reference(frames).token_ids)
    prior.image_size = 0  # after the tuner has made its copy
    seen.clear()
    tuner.start(frames, ACTIONS, torch.ones(4))
    tuner.poll()
    assert set(seen) == {0}


def test_setting_it_while_a_round_begins(nano, frames, monkeypatch):
    """The round sees one size throughout: the new one comes after its layout."""
    layout = ActionPrior.layout
    setters: list[threading.Thread] = []

    def set_meanwhile(prior, size):
        if not setters:
            setters.append(threading.Thread(target=setattr, args=(prior, "image_size", LARGE)))
            setters[0].start()
            setters[0].join(0.2)
        return layout(prior, size)

    monkeypatch.setattr(ActionPrior, "layout", set_meanwhile)
    tuner = VLMTuner(nano, TunerConfig(mode="full", max_steps=1))
    tuner.start(frames[:4], ACTIONS, torch.arange(4.0))
    assert tuner.poll().steps == 1
    setters[0].join()
    assert nano.image_size == LARGE


def test_frames_are_shifted_before_they_are_resized(frames):
    """By pixels of the agent's frame, as without `image_size`."""
    prior = make_nano(image_size=LARGE)
    samples = Samples.build(prior.grammar, frames[:4], ACTIONS, torch.ones(4))
    model = AnswerModel(prior.backbone, prior.layout((84, 84)), checkpointing=False)
    rows = torch.arange(4)
    images = RoundImages(model, samples, rows, TunerConfig(mode="full", shift=4), seeded(5))
    offsets = torch.randint(9, (4, 2), generator=seeded(5))
    moved = ops.random_shift(frames[:4], offsets, 4, dtype=torch.uint8)
    assert torch.equal(images.shifted(rows).tokens, prior.backbone.image_features(moved).tokens)


def test_copies_of_a_backbone_keep_it(tmp_path):
    prior = make_nano(image_size=LARGE)
    VLMTuner(prior, TunerConfig(lora_rank=4))
    prior.merge_adapter()
    assert prior.image_size == LARGE


def test_sizes_that_are_too_small_or_no_sizes(checkpoint):
    prior = open_prior(checkpoint)
    least = {"qwen3_vl": 32, "smolvlm": 8, "llava": 14}.get(checkpoint.name, 28)
    for size in (-1, 1, least - 1):
        with pytest.raises(ValueError, match=f"image_size={size} is too small .* at least {least}, or 0"):
            prior.image_size = size
    assert prior.image_size == 0
    prior.image_size = least
    frames = frames_for(checkpoint)
    assert torch.equal(prior(frames).token_ids, prior.reference(frames).token_ids)
    for wrong in (True, 2.0, "112"):
        with pytest.raises(TypeError, match=r"image_size is .*: it must be an integer"):
            ActionPrior.from_pretrained(checkpoint, action_dim=2, device="cpu", image_size=wrong)


def test_runs_take_it_from_their_settings():
    config = TrainConfig.preset("carracing")
    assert config.vlm.image_size == 0
    config.vlm.image_size = -1
    with pytest.raises(UserError, match=r"vlm\.image_size=-1 must be at least 0"):
        config.check()
    for name in ("carracing", "carracing-gpu", "walker-walk"):
        assert TrainConfig.preset(name, "owner/model").vlm.image_size == 224


def test_the_tokens_of_qwen2_5_vl():
    """What the preset says of a pretrained model, in the settings of its processor."""
    from test_pixels import PROCESSORS

    from covr_fast.vlm.model.patches import PatchPixels

    patches = PatchPixels(PROCESSORS["qwen2.5-vl"]())
    tokens = {size: patches.grid(size, size)[0] * patches.grid(size, size)[1] // 4 for size in (84, 224)}
    assert tokens == {84: 9, 224: 64}
