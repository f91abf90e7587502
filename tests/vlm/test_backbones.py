"""Every supported architecture, opened from a checkpoint on disk: fast answers, training, LoRA."""

import torch
from peft import PeftModel
from tiny import ACTIONS, model_loss
from transformers import AutoModelForImageTextToText

from covr_fast.vlm import ActionPrior, TunerConfig, VLMTuner
from covr_fast.vlm.finetune.objective import AnswerModel, Samples, weighted_loss


def test_fast_path_equals_generate(opened):
    prior, frames = opened
    for temperature in (0.0, 1.0):
        fast = prior(frames, temperature=temperature, generator=torch.Generator().manual_seed(1))
        slow = prior.reference(frames, temperature=temperature, generator=torch.Generator().manual_seed(1))
        assert torch.equal(fast.token_ids, slow.token_ids)
        assert torch.equal(fast.action, slow.action)
    assert len(set(fast.text)) > 1


def test_hidden_states_equal_the_models_own(opened):
    """Not only the same argmax: the serving decoder's prefill against transformers' forward."""
    prior, frames = opened
    backbone = prior.backbone
    size = tuple(frames.shape[2:])
    layout = prior.layout(size)
    with torch.no_grad():
        image = backbone.image_features(frames)
        prior(frames)
        decoder = prior._decoders[size]
        ours = decoder._transformer(
            decoder._body[:, : len(layout.body)].expand(len(frames), -1, -1),
            decoder._attention,
            decoder.new_cache(len(frames)),
            image_at=layout.image_at,
            image=image,
        )
        inputs = backbone.process(prior.text, frames)
        theirs = backbone.base.model(**inputs).last_hidden_state[:, -1:]
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


def test_training_loss_equals_transformers_own(opened):
    prior, frames = opened
    samples = Samples.build(prior.grammar, frames, ACTIONS, torch.ones(4))
    rows = torch.arange(4)
    for checkpointing in (False, True):
        model = AnswerModel(
            prior.backbone, prior.layout(tuple(frames.shape[2:])), checkpointing=checkpointing
        )
        ours = weighted_loss(model, samples, rows, model.image(frames), samples.valid_tokens(rows), 0.0)
        torch.testing.assert_close(ours, model_loss(prior, frames), rtol=1e-5, atol=1e-6)


def test_lora_round_and_adapter_on_disk(opened, checkpoint, tmp_path):
    prior, frames = opened
    config = TunerConfig(lora_rank=4, lora_alpha=8, epochs=4, batch_size=4, micro_batch=4, learning_rate=5e-3)
    tuner = VLMTuner(prior, config)
    adapted = {name.split(".")[-4] for name, p in prior.backbone.model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not any("vis" in n for n, p in prior.backbone.model.named_parameters() if p.requires_grad)
    data = frames.repeat(3, 1, 1, 1)
    tuner.start(data, torch.full((12, 2), 0.5), torch.ones(12))
    report = tuner.poll()
    assert report.loss_after < report.loss_before
    tuner.publish()
    answers = prior(frames)
    assert torch.equal(answers.token_ids, prior.reference(frames).token_ids), "adapters are merged to serve"
    prior.save_pretrained(tmp_path)
    again = ActionPrior.from_pretrained(tmp_path, action_dim=2, device="cpu")
    assert torch.equal(again(frames).token_ids, answers.token_ids)
    base = AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert PeftModel.from_pretrained(base, tmp_path).peft_config["default"].r == 4


def test_the_prompts_text_comes_before_the_image_where_the_template_allows(opened, checkpoint):
    prior, frames = opened
    layout = prior.layout(tuple(frames.shape[2:]))
    llava = checkpoint.name == "llava"
    assert ("Drive." in prior.backbone.tokenizer.decode(layout.prefix)) != llava
