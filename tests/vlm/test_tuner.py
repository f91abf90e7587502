"""Fine-tuning: what is learned from, what is counted, and that it learns."""

import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from test_grammar import CONTEXT, TOKENIZERS
from tiny import equal, make_nano, weights_of

from covr_fast import ops
from covr_fast.vlm import ActionPrior, TunerConfig, VLMTuner
from covr_fast.vlm.answer.grammar import ActionGrammar
from covr_fast.vlm.finetune.held_out import served_nll
from covr_fast.vlm.finetune.objective import (
    IGNORE,
    AnswerModel,
    RoundImages,
    Samples,
    weighted_loss,
)
from covr_fast.vlm.model.attention import causal_mask
from covr_fast.vlm.model.loading import load_backbone

QUICK = TunerConfig(
    mode="full",
    learning_rate=2e-3,
    epochs=2,
    batch_size=16,
    micro_batch=8,
    label_smoothing=0.05,
    held_out=0.2,
)


def colours(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A toy task: the frame's red and blue say the action."""
    generator = torch.Generator().manual_seed(seed)
    actions = torch.randint(-1, 2, (count, 2), generator=generator) * 0.5
    frames = torch.randint(0, 40, (count, 3, 56, 56), dtype=torch.uint8, generator=generator)
    levels = ((actions + 1) * 100).to(torch.uint8)
    frames[:, 0] += levels[:, 0, None, None]
    frames[:, 2] += levels[:, 1, None, None]
    return frames, actions


def quick(prior: ActionPrior, **changes) -> VLMTuner:
    return VLMTuner(prior, replace(QUICK, **changes))


def start(tuner: VLMTuner, count: int) -> None:
    tuner.start(*colours(count), torch.linspace(0, 1, count))


def answer_model(prior: ActionPrior, checkpointing: bool = False, size=(56, 56)) -> AnswerModel:
    return AnswerModel(prior.backbone, prior.layout(size), checkpointing=checkpointing)


# ---------------------------------------------------------------------- the loss


def test_labels_are_the_answer_and_nothing_else(nano):
    frames, actions = colours(6)
    samples = Samples.build(nano.grammar, frames, actions, torch.ones(6))
    for row, action in zip(samples.labels.tolist(), actions.tolist(), strict=True):
        tokens = [token for token in row if token != IGNORE]
        assert tokens[-1] == nano.grammar.eos_token_id
        text = nano.backbone.tokenizer.decode(tokens[:-1], clean_up_tokenization_spaces=False)
        assert text == f"Action: [{action[0]:.2f}, {action[1]:.2f}]".replace("-0.00", "0.00")


def test_padding_after_short_answers_has_no_label():
    grammar = ActionGrammar(TOKENIZERS["uneven"](), CONTEXT, action_dim=2, decimals=2)
    actions = torch.tensor([[0.5, 0.5], [-0.15, -1.0], [0.9, -0.1]])
    samples = Samples.build(grammar, colours(3)[0], actions, torch.ones(3))
    lengths = []
    for row, answer in zip(samples.labels.tolist(), samples.answers.tolist(), strict=True):
        length = answer.index(grammar.eos_token_id) + 1
        assert row == answer[:length] + [IGNORE] * (len(answer) - length)
        lengths.append(length)
    assert len(set(lengths)) > 1, "all answers are of one length: nothing was padded"
    assert samples.valid_tokens(torch.arange(3)) == sum(lengths)


def test_gradients_through_the_shared_prefix_equal_those_of_repeated_prefixes(nano):
    frames, actions = colours(4)
    samples = Samples.build(nano.grammar, frames, actions, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    nano.backbone.model.requires_grad_(True)
    gradients = []
    for checkpointing in (False, True):
        model = answer_model(nano, checkpointing)
        loss = weighted_loss(model, samples, torch.arange(4), model.image(frames), 40, 0.1)
        gradients.append(torch.autograd.grad(loss, list(nano.backbone.model.parameters())))
    for shared, repeated in zip(*gradients, strict=True):
        torch.testing.assert_close(shared, repeated, rtol=1e-3, atol=1e-6)


def test_n_v_counts_zero_weight_rows_and_micro_batches_change_nothing(nano):
    """Eq. 6 by hand from full logits over all rows, against accumulation over the rows of non-zero weight."""
    frames, actions = colours(9)
    returns = torch.tensor([0.0, 1.0, 2.0, 10.0, 8.0, 9.0, 4.0, 5.5, 7.0])
    samples = Samples.build(nano.grammar, frames, actions, returns)
    assert (samples.weights == 0).sum() == 4
    rows = torch.arange(9)
    model = answer_model(nano)
    smoothing = 0.1

    with torch.no_grad():
        hidden = model.hidden(model.image(frames), samples.answers, samples.lengths(rows))
        logits = F.linear(hidden, nano.backbone.head.weight)
        log_p = logits.log_softmax(-1)
        nll = -log_p.gather(2, samples.answers[..., None])[..., 0]
        nll = (1 - smoothing) * nll - smoothing * log_p.mean(-1)
        gbar = 2 * (returns - returns.min()) / (returns.max() - returns.min()) - 1
        valid = (samples.labels != IGNORE).float()
        by_hand = (gbar.clamp(min=0) * (nll * valid).sum(1)).sum() / valid.sum()

    total = 0.0
    seen = []
    for part in samples.micro_batches(rows, 2):
        seen += part.tolist()
        image = model.image(frames[part])
        total += weighted_loss(model, samples, part, image, samples.valid_tokens(rows), smoothing).item()
    assert seen == samples.weights.nonzero()[:, 0].tolist()
    assert total == pytest.approx(by_hand.item(), rel=1e-5)


def test_the_mask_is_causal_after_the_past():
    mask = causal_mask(2, 3, torch.float32, torch.device("cpu"))[0, 0]
    assert (mask == 0).tolist() == [[True, True, True, True, False], [True] * 5]


# ---------------------------------------------------------------------- rounds


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_round_lowers_the_held_out_loss_and_the_prior_learns_the_task(nano, mode):
    frames, actions = colours(192)
    config = TunerConfig(
        mode=mode,
        lora_rank=32,
        lora_alpha=64,
        learning_rate=3e-3,
        epochs=14,
        batch_size=32,
        micro_batch=32,
        label_smoothing=0.0,
    )
    tuner = VLMTuner(nano, config)
    test_frames, test_actions = colours(48, seed=1)
    before = (nano(test_frames).action - test_actions).abs().mean()
    tuner.start(frames, actions, torch.ones(192))
    report = tuner.poll()
    assert report is not None
    assert report.loss_after < report.loss_before
    assert (report.samples, report.trained, report.held_out) == (192, 173, 19)
    assert report.nonzero_share == 1.0
    assert report.steps == 14 * 6
    assert torch.equal(nano(test_frames[:4]).action, nano.reference(test_frames[:4]).action)
    assert (nano(test_frames).action - test_actions).abs().mean() == before, "served before it was published"
    assert tuner.publish() == 1
    answers = nano(test_frames)
    assert answers.version == 1
    error = (answers.action - test_actions).abs().mean()
    assert error < 0.15 if mode == "full" else error < 0.75 * before
    assert torch.equal(answers.token_ids, nano.reference(test_frames).token_ids)


def test_reruns_are_bit_identical_and_seeds_matter():
    frames, actions = colours(40)
    returns = torch.linspace(0, 1, 40)

    def run(seed):
        prior = make_nano()
        tuner = quick(prior, seed=seed)
        reports = []
        for _ in range(2):
            tuner.start(frames, actions, returns)
            report = tuner.poll()
            reports.append((report.loss_before, report.loss_after, report.steps))
            tuner.publish()
        return reports, weights_of(prior)

    (first, weights), (again, same), (other, _) = run(0), run(0), run(1)
    assert first == again
    assert equal(weights, same)
    assert first != other


def test_overlapped_round_equals_the_synchronous_one_and_the_prior_serves_meanwhile(frames):
    data, actions = colours(60)
    weights = []
    for overlap in (False, True):
        prior = make_nano()
        expected = prior(frames).token_ids
        tuner = quick(prior, overlap=overlap)
        tuner.start(data, actions, torch.ones(60))
        if overlap:
            assert tuner.running
            assert tuner.poll() is None
            with pytest.raises(RuntimeError, match="still running"):
                tuner.publish()
            with pytest.raises(RuntimeError, match="still running"):
                tuner.start(data, actions, torch.ones(60))
        assert torch.equal(prior(frames).token_ids, expected)
        assert tuner.wait() is not None
        assert tuner.poll() is None, "a report is given once"
        tuner.publish()
        weights.append(weights_of(prior))
    assert equal(*weights)


def test_zero_weight_samples_get_no_forward(nano, monkeypatch):
    frames, actions = colours(30)
    returns = torch.cat((torch.zeros(20), torch.ones(10)))
    tuner = quick(nano, epochs=1)
    forwarded = 0
    hidden = AnswerModel.hidden

    def counting(self, image, answers, lengths):
        nonlocal forwarded
        forwarded += len(answers) * torch.is_grad_enabled()
        return hidden(self, image, answers, lengths)

    monkeypatch.setattr(AnswerModel, "hidden", counting)
    tuner.start(frames, actions, returns)
    report = tuner.poll()
    assert report.nonzero_share == pytest.approx(1 / 3)
    assert 0 < forwarded == report.trained <= 10


def test_the_best_epoch_is_kept(nano):
    """A learning rate that wrecks the model: the round ends with the weights it began with."""
    frames, actions = colours(40)
    good = quick(nano)
    good.start(frames, actions, torch.ones(40))
    good.publish()
    bad = quick(nano, learning_rate=10.0)
    expected = weights_of(nano)
    bad.start(frames, actions, torch.ones(40))
    report = bad.poll()
    assert report.loss_after == report.loss_before
    bad.publish()
    assert equal(expected, weights_of(nano))


def test_the_average_of_the_weights_is_published(nano, monkeypatch):
    frames, actions = colours(24)
    tuner = quick(nano, average=0.75, epochs=1, held_out=0.0, batch_size=8)
    parameter = next(p for p in tuner._backbone.model.parameters() if p.requires_grad)
    expected, step = parameter.detach().clone(), torch.optim.AdamW.step

    def watched(*args, **kwargs):
        result = step(*args, **kwargs)
        expected.lerp_(parameter.detach(), 0.25)
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    tuner.start(frames, actions, torch.linspace(0, 1, 24))
    assert tuner.poll().steps == 3
    torch.testing.assert_close(parameter.detach(), expected)
    assert not torch.equal(expected, next(iter(nano.backbone.model.parameters())))


def test_one_sample_is_enough(nano):
    frames, actions = colours(1)
    tuner = quick(nano)
    tuner.start(frames, actions, torch.ones(1))
    report = tuner.poll()
    assert (report.trained, report.held_out) == (1, 0)
    assert report.loss_before != report.loss_before


@pytest.mark.parametrize("overlap", [False, True])
def test_a_full_gpu_says_what_to_lower(nano, monkeypatch, overlap):
    def full(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(AnswerModel, "image", full)
    tuner = quick(nano, overlap=overlap)

    def tune():
        start(tuner, 8)
        tuner.wait()

    with pytest.raises(MemoryError, match=r"while fine-tuning: lower micro_batch \(it is 8\)"):
        tune()


# ---------------------------------------------------------------------- rounds that end early


@pytest.mark.parametrize("moment", ["at once", "after a step", "at the end"])
def test_stop_undoes_the_round(nano, monkeypatch, moment):
    tuner = quick(nano, overlap=True, epochs=2 if moment == "at the end" else 500)
    before = weights_of(nano)
    stepped = threading.Event()
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a, **k: (step(*a, **k), stepped.set())[0])
    start(tuner, 32)
    if moment == "after a step":
        assert stepped.wait(60)
    elif moment == "at the end":
        tuner._thread.join()
    tuner.stop()
    assert not tuner.running
    assert tuner.poll() is None
    assert equal(before, weights_of(tuner))
    tuner.publish()
    assert equal(before, weights_of(nano))


def broken_at(call: int, error: BaseException):
    """An optimizer step that fails the given time."""
    steps = []
    step = torch.optim.AdamW.step

    def stepping(*args, **kwargs):
        steps.append(1)
        if len(steps) == call:
            raise error
        return step(*args, **kwargs)

    return stepping


def of_a_round(tuner):
    """Report and weights of a round, which leaves no gradients."""
    start(tuner, 32)
    report = tuner.wait()
    assert all(p.grad is None for p in tuner._backbone.model.parameters())
    return report.round, report.loss_after, weights_of(tuner)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("error", [ArithmeticError("broken"), KeyboardInterrupt()])
def test_a_round_that_fails_leaves_no_trace(monkeypatch, error, overlap):
    priors = make_nano(), make_nano()
    tuner, other = (quick(prior, overlap=overlap) for prior in priors)
    before = weights_of(priors[0])
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", broken_at(3, error))
        with pytest.raises(type(error)):
            of_a_round(tuner)
    assert all(p.grad is None for p in tuner._backbone.model.parameters())
    tuner.publish()
    assert equal(before, weights_of(priors[0]))
    assert tuner.rounds == 0
    (*ours, weights), (*theirs, expected) = of_a_round(tuner), of_a_round(other)
    assert ours == theirs
    assert equal(weights, expected)


def test_a_stopped_round_leaves_no_trace(monkeypatch):
    tuner, other = (quick(make_nano(), overlap=True, micro_batch=2, epochs=2) for _ in range(2))
    begun, halted = threading.Event(), threading.Event()
    loss = weighted_loss

    def halting(*args):
        value = loss(*args)
        if begun.is_set():  # the micro-batch after the first: gradients of one are there
            halted.wait(60)
        begun.set()
        return value

    with monkeypatch.context() as patch:
        patch.setattr("covr_fast.vlm.finetune.round.weighted_loss", halting)
        start(tuner, 32)
        assert begun.wait(60)
        tuner._stop.set()
        halted.set()
        tuner.stop()
    assert all(p.grad is None for p in tuner._backbone.model.parameters())
    (*ours, weights), (*theirs, expected) = of_a_round(tuner), of_a_round(other)
    assert ours == theirs
    assert equal(weights, expected)


def test_stop_keeps_the_rounds_before_the_one_it_drops(nano):
    """Published or not."""
    tuner = quick(nano)
    _, _, kept = of_a_round(tuner)
    frames, actions = colours(32)
    tuner.start(frames, -actions, torch.linspace(0, 1, 32))
    tuner.stop()
    assert equal(kept, weights_of(tuner))
    assert tuner.rounds == 1
    tuner.start(frames, -actions, torch.linspace(0, 1, 32))
    tuner.publish()
    published = weights_of(nano)
    tuner.stop()
    assert equal(published, weights_of(tuner))
    assert tuner.rounds == 2


# ---------------------------------------------------------------------- LoRA and frozen features


def test_lora_trains_adapters_only_and_saves_in_pefts_format(tmp_path):
    frames, actions = colours(40)
    prior = make_nano(seed=2)
    base = {name: p.detach().clone() for name, p in prior.backbone.base.named_parameters()}
    untouched = prior(frames[:4]).token_ids
    tuner = quick(prior, mode="lora", lora_rank=4, lora_alpha=8)
    assert torch.equal(prior(frames[:4]).token_ids, untouched), "fresh adapters change nothing"
    tuner.start(frames, actions, torch.ones(40))
    tuner.publish()
    for name, p in prior.backbone.base.named_parameters():
        assert "lora_" in name or torch.equal(p, base[name.replace(".base_layer", "")])
    prior.save_pretrained(tmp_path)
    again = ActionPrior.from_pretrained(tmp_path, action_dim=2, device="cpu")
    assert VLMTuner(again, tuner.config).parameters == tuner.parameters

    fresh = load_backbone("nano", seed=2, attention="sdpa", dtype=None, device=torch.device("cpu"))
    theirs = PeftModel.from_pretrained(fresh.model, tmp_path)
    adapters = [name for name, _ in prior.backbone.model.named_parameters() if "lora_" in name]
    assert adapters
    for name in adapters:
        assert torch.equal(theirs.get_parameter(name), prior.backbone.model.get_parameter(name))


def test_cached_image_features_change_nothing(monkeypatch):
    weights, calls = [], []
    image = AnswerModel.image

    def counting(self, frames):
        calls[-1] += len(frames)
        return image(self, frames)

    monkeypatch.setattr(AnswerModel, "image", counting)
    for cached, shift in ((False, 0), (True, 0), (True, 2)):
        calls.append(0)
        tuner = quick(make_nano(), mode="lora", lora_rank=4, cache_image_features=cached, shift=shift)
        start(tuner, 30)
        report = tuner.poll()
        weights.append(weights_of(tuner))
    for a, b in zip(*weights[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert calls[1] == report.trained + report.held_out < calls[0]
    assert calls[2] > 30, "features of shifted frames were cached"


def test_checkpointing_does_not_differentiate_a_frozen_vision_tower(nano):
    tuner = quick(nano, mode="lora", gradient_checkpointing=True)
    with torch.enable_grad():
        assert not tuner._backbone.image_features(colours(2)[0]).requires_grad


def test_training_sees_shifted_frames_and_the_held_out_loss_does_not(nano, monkeypatch):
    frames, actions = colours(12)
    pad = 2
    shifts = {
        ops.random_shift(frame[None], torch.tensor([[dy, dx]]), pad, dtype=torch.uint8).numpy().tobytes()
        for frame in frames
        for dy in range(2 * pad + 1)
        for dx in range(2 * pad + 1)
    }
    originals = {frame.numpy().tobytes() for frame in frames}
    seen: dict[bool, list[bytes]] = {True: [], False: []}
    image = AnswerModel.image

    def watched(self, frames):
        seen[torch.is_grad_enabled()].extend(frame.numpy().tobytes() for frame in frames)
        return image(self, frames)

    monkeypatch.setattr(AnswerModel, "image", watched)
    tuner = quick(nano, shift=pad)
    tuner.start(frames, actions, torch.linspace(0, 1, 12))
    assert set(seen[True]) <= shifts
    assert not set(seen[True]) <= originals
    assert set(seen[False]) <= originals


# ---------------------------------------------------------------------- bad input


def test_arguments_that_do_not_fit(nano):
    frames, actions = colours(4)
    tuner = quick(nano)
    for arguments, error, message in (
        ((frames[:0], actions[:0], torch.ones(0)), ValueError, "at least one frame"),
        ((frames, actions[:, :1], torch.ones(4)), ValueError, r"actions must have shape \[4, 2\]"),
        ((frames, actions, torch.ones(3)), ValueError, r"returns must have shape \[4\]"),
        ((frames, actions, torch.tensor([1.0, torch.nan, 0.0, 0.0])), ValueError, "finite"),
        ((frames, actions, torch.full((4,), torch.inf)), ValueError, "finite"),
        ((frames.float(), actions, torch.ones(4)), TypeError, "frames must be a uint8"),
    ):
        with pytest.raises(error, match=message):
            tuner.start(*arguments)
    assert tuner.rounds == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"mode": "half"},
        {"packing": "yes"},
        {"epochs": 0},
        {"held_out": 1.0},
        {"learning_rate": 0.0},
        {"max_steps": 0},
        {"shift": -1},
    ],
)
def test_config_out_of_range(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TunerConfig(**bad)


def test_the_held_out_loss_is_per_token_and_knows_no_weights(nano):
    frames, actions = colours(3)
    model, rows = answer_model(nano), torch.arange(3)
    alike = Samples.build(nano.grammar, frames, actions, torch.ones(3))
    assert alike.weights.tolist() == [1, 1, 1]
    expected = weighted_loss(model, alike, rows, model.image(frames), alike.valid_tokens(rows), 0.0).item()
    for returns in ([1.0, 1.0, 1.0], [0.0, 5.0, 1.0]):
        samples = Samples.build(nano.grammar, frames, actions, torch.tensor(returns))
        images = RoundImages(model, samples, rows, TunerConfig(micro_batch=2), torch.Generator())
        loss = served_nll(nano.backbone, model.layout, samples, rows, images, 2)
        assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("overlap", [False, True])
def test_returns_on_a_gpu_are_weighed_there(nano, overlap):
    frames, actions = colours(10)
    returns = torch.linspace(0, 1, 10)
    weighed = Samples.build(nano.grammar, frames, actions, returns.cuda())
    torch.testing.assert_close(weighed.weights, ops.return_weights(returns))
    tuner = quick(nano, epochs=1, overlap=overlap)

    def run(returns: torch.Tensor):
        tuner.start(frames, actions, returns.cuda())
        return tuner.wait()

    with pytest.raises(ValueError, match="returns must be finite"):
        run(returns.where(returns < 0.5, torch.nan))
    assert tuner.rounds == 0
    assert run(returns).round == 1


def test_samples_of_any_weight_are_held_out_but_not_the_best(nano):
    frames, actions = colours(10)
    returns = torch.tensor([0.0, 1, 2, 9, 3, 1, 0, 2, 1, 3])  # one of non-zero weight
    for seed in range(4):
        tuner = quick(nano, held_out=0.9, seed=seed, epochs=1)
        tuner.start(frames, actions, returns)
        report = tuner.poll()
        assert (report.samples, report.trained, report.held_out) == (10, 1, 9)
        assert report.nonzero_share == pytest.approx(0.1)
