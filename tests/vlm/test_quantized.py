"""Models in 8 and 4 bits, by bitsandbytes on the CPU: one base is served and trained on, and stored once."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, get_peft_model
from test_saving import tuned
from tiny import ROWWISE, equal, random_frames, write_qwen2_5_vl
from transformers import BitsAndBytesConfig, QuantoConfig

from covr_fast import TrainConfig
from covr_fast.errors import UserError
from covr_fast.load_vlm import load_prior
from covr_fast.vlm import ActionPrior, TunerConfig, VLMTuner
from covr_fast.vlm.finetune.lora import trainable

OPTIONS = {"action_dim": 2, "prompt": "Drive.", "device": "cpu"}
ROUND = TunerConfig(
    mode="lora", lora_rank=4, lora_alpha=8, epochs=2, batch_size=12, micro_batch=6, learning_rate=5e-3
)


@pytest.fixture
def frames():
    return random_frames((64, 64), 12, seed=3)


@pytest.fixture(params=["8bit", "4bit"])
def asked(request):
    return request.param


def start(tuner: VLMTuner, frames: torch.Tensor) -> None:
    tuner.start(frames, torch.full((len(frames), 2), 0.5), torch.ones(len(frames)))


def linears(model) -> dict:
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear8bitLt | Linear4bit)}


def stored(module) -> list[torch.Tensor]:
    """Every tensor of a quantized layer."""
    if isinstance(module, Linear8bitLt):
        return [module.weight, module.state.CB, module.state.SCB]
    state = module.weight.quant_state
    return [module.weight, state.absmax, state.state2.absmax]


def plain_twin(prior: ActionPrior, source) -> ActionPrior:
    """The prior with its quantized weights as plain numbers, by bitsandbytes' definition of them."""
    twin = ActionPrior.from_pretrained(source, quantization="none", **OPTIONS)
    for name, module in linears(prior.backbone.base).items():
        weight = twin.backbone.base.get_submodule(name).weight
        if isinstance(module, Linear8bitLt):
            weight.data = module.state.CB.float() * module.state.SCB[:, None] / 127
        else:
            weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state).view_as(weight)
    return twin


@pytest.mark.parametrize("asked", ["4bit", ROWWISE], ids=["4bit", "8bit"])
def test_fast_path_equals_generate(checkpoint, frames, asked):
    prior = ActionPrior.from_pretrained(checkpoint, quantization=asked, **OPTIONS)
    assert prior.backbone.quantized
    assert linears(prior.backbone.decoder)
    fast, slow = prior(frames), prior.reference(frames)
    # In 8 bits inputs are rounded too, which here and there makes a choice of what rounding left of a tie.
    rows = (fast.token_ids == slow.token_ids).all(1)
    assert rows.all() if asked == "4bit" else rows.float().mean() > 0.7
    if asked == "4bit":
        assert torch.equal(plain_twin(prior, checkpoint)(frames).token_ids, fast.token_ids)


@pytest.mark.needs_cuda
def test_on_a_gpu_it_answers_as_generate_and_learns(checkpoint, frames, asked):
    options = {**OPTIONS, "device": "cuda", "dtype": torch.bfloat16}
    prior = ActionPrior.from_pretrained(checkpoint, quantization=asked, **options)
    frames = frames.cuda()
    fast, slow = prior(frames), prior.reference(frames)
    assert (fast.token_ids == slow.token_ids).all(1).float().mean() > 0.5  # bfloat16 makes other choices
    tuner = VLMTuner(ActionPrior.from_pretrained("nano", quantization=asked, **options), ROUND)
    start(tuner, frames)
    report = tuner.wait()
    assert report.loss_after < 0.8 * report.loss_before


@pytest.mark.parametrize("called_first", [False, True])
def test_the_tuner_trains_on_the_base_that_is_served_and_stored_once(frames, asked, called_first):
    prior = ActionPrior.from_pretrained("nano", quantization=asked, **OPTIONS)
    if called_first:
        prior(frames)
    twin = VLMTuner(plain_twin(prior, "nano"), ROUND)
    tuner = VLMTuner(prior, ROUND)
    start(tuner, frames)
    start(twin, frames)
    report, expected = tuner.poll(), twin.poll()
    assert report.loss_before == pytest.approx(expected.loss_before, rel=5e-3 if asked == "8bit" else 1e-4)
    assert report.loss_after < 0.8 * report.loss_before
    untuned = prior(frames).action
    tuner.publish()
    tuned = prior(frames).action
    assert (tuned - 0.5).abs().mean() < (untuned - 0.5).abs().mean()
    served, trained = linears(prior.backbone.model), linears(tuner._backbone.model)
    assert served
    assert served.keys() == trained.keys()
    for name, module in served.items():
        ours = [tensor.data_ptr() for tensor in stored(module)]
        assert ours == [tensor.data_ptr() for tensor in stored(trained[name])], name
        if asked == "8bit":
            assert ours[0] == ours[1], "the weights and bitsandbytes' own reference to them"


def test_a_round_beside_calls_equals_one_alone(frames, asked):
    weights = []
    for overlap in (False, True):
        prior = ActionPrior.from_pretrained("nano", quantization=asked, **OPTIONS)
        tuner = VLMTuner(prior, replace(ROUND, overlap=overlap))
        before = prior(frames).token_ids
        start(tuner, frames)
        while tuner.running:
            assert torch.equal(prior(frames).token_ids, before)
        assert tuner.wait() is not None
        weights.append(trainable(tuner._backbone.model))
    assert equal(*weights)


def test_recomputed_activations_and_bfloat16(frames, asked):
    prior = ActionPrior.from_pretrained("nano", quantization=asked, dtype=torch.bfloat16, **OPTIONS)
    before = prior(frames).token_ids
    tuner = VLMTuner(prior, replace(ROUND, gradient_checkpointing=True))
    start(tuner, frames)
    report = tuner.poll()
    assert report.loss_after < 0.8 * report.loss_before
    assert torch.equal(prior(frames).token_ids, before), "training changed how the prior's layers compute"


# ---------------------------------------------------------------------- saved and opened


def same(a: ActionPrior, b: ActionPrior, frames: torch.Tensor) -> bool:
    ours, theirs = (dict(prior.backbone.model.named_parameters()) for prior in (a, b))
    alike = ours.keys() == theirs.keys() and equal(ours.values(), theirs.values())
    return alike and torch.equal(a(frames).token_ids, b(frames).token_ids)


def assert_saved_twice_opens(prior: ActionPrior, frames: torch.Tensor, folder) -> None:
    prior.save_pretrained(folder / "a")
    opened = ActionPrior.from_pretrained(folder / "a", **OPTIONS)
    assert opened.backbone.quantized
    assert same(opened, prior, frames)
    opened.save_pretrained(folder / "b")
    assert same(ActionPrior.from_pretrained(folder / "b", **OPTIONS), prior, frames)


def test_an_adapter_opens_on_its_base_as_it_was_quantized(checkpoint, frames, asked, tmp_path):
    prior = tuned(ActionPrior.from_pretrained(checkpoint, quantization=asked, **OPTIONS), ROUND, 0)
    assert_saved_twice_opens(prior, frames, tmp_path)


def test_a_configuration_is_kept(frames, tmp_path):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    prior = tuned(ActionPrior.from_pretrained("nano", quantization=config, **OPTIONS), ROUND, 0)
    assert_saved_twice_opens(prior, frames, tmp_path)
    opened = ActionPrior.from_pretrained(tmp_path / "b", **OPTIONS)
    layer = next(iter(linears(opened.backbone.decoder).values()))
    assert (layer.compute_dtype, layer.weight.quant_type) == (torch.bfloat16, "fp4")
    assert not ActionPrior.from_pretrained(tmp_path / "b", quantization="none", **OPTIONS).backbone.quantized


def test_a_checkpoint_of_quantized_weights(checkpoint, frames, asked, tmp_path):
    prior = ActionPrior.from_pretrained(checkpoint, quantization=asked, **OPTIONS)
    assert_saved_twice_opens(prior, frames, tmp_path / "full")
    source = tmp_path / "full" / "a"
    with pytest.raises(ValueError, match="is quantized already: leave out quantization"):
        ActionPrior.from_pretrained(source, quantization="none", **OPTIONS)
    opened = tuned(ActionPrior.from_pretrained(source, **OPTIONS), ROUND, 0)
    assert_saved_twice_opens(opened, frames, tmp_path / "adapter")


# ---------------------------------------------------------------------- refused by name


def test_every_weight_of_a_quantized_model(tmp_path):
    prior = ActionPrior.from_pretrained("nano", quantization="4bit", **OPTIONS)
    with pytest.raises(ValueError, match=r"mode='full' cannot train quantized weights: take mode='lora'"):
        VLMTuner(prior, TunerConfig(mode="full"))
    VLMTuner(prior, ROUND)
    prior.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"mode='full' cannot train quantized weights"):
        VLMTuner(ActionPrior.from_pretrained(tmp_path / "a", **OPTIONS), TunerConfig(mode="full"))


@pytest.mark.parametrize("asked", ["int4", 4, QuantoConfig(weights="int8")])
def test_another_quantization(asked):
    with pytest.raises(ValueError, match=r"quantization=.* is not supported: give 'none', '8bit', '4bit'"):
        ActionPrior.from_pretrained("nano", quantization=asked, **OPTIONS)


@pytest.mark.parametrize("settings", [{}, {"load_in_8bit": True, "llm_int8_has_fp16_weight": True}])
def test_a_configuration_that_quantizes_nothing(settings):
    with pytest.raises(ValueError, match=r"quantization must set load_in_8bit or load_in_4bit"):
        ActionPrior.from_pretrained("nano", quantization=BitsAndBytesConfig(**settings), **OPTIONS)


@pytest.mark.parametrize("method", ["gptq", "awq", "torchao"])
def test_a_checkpoint_quantized_by_others(method, tmp_path):
    write_qwen2_5_vl(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = rf"is quantized by '{method}', which is not supported: give the one"
    with pytest.raises(ValueError, match=message):
        ActionPrior.from_pretrained(tmp_path, **OPTIONS)


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=r"pip install 'covr-fast\[quantize\]'"):
        ActionPrior.from_pretrained("nano", quantization="8bit", **OPTIONS)


def test_graphs():
    with pytest.raises(ValueError, match="graph=True cannot record quantized layers"):
        ActionPrior.from_pretrained("nano", quantization="8bit", graph=True, **OPTIONS)


# ---------------------------------------------------------------------- the command line's setting


def test_the_setting_of_a_run(tmp_path):
    config = TrainConfig.preset("carracing")
    config.vlm.quantization = "4bit"
    with pytest.raises(UserError, match=r"vlm\.quantization='4bit'.*use tuner\.mode='lora'"):
        config.check()
    config.tuner = ROUND
    config.check()
    prior = load_prior(config, 2, torch.device("cpu"), "nano")
    assert prior.backbone.quantized
    VLMTuner(prior, ROUND)
    prior.save_pretrained(tmp_path / "vlm")
    config.vlm.quantization = "auto"
    assert load_prior(config, 2, torch.device("cpu"), tmp_path / "vlm").backbone.quantized
    config.vlm.quantization = "none"
    assert not load_prior(config, 2, torch.device("cpu"), tmp_path / "vlm").backbone.quantized


def test_dora_on_8_bits_is_refused_where_peft_cannot_run_it(frames, tmp_path):
    prior = ActionPrior.from_pretrained("nano", **OPTIONS)
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, base_model_name_or_path="nano")
    prior.backbone.model = get_peft_model(prior.backbone.model, config)
    prior.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"DoRA .* 8-bit .* take quantization='4bit' or 'none'"):
        ActionPrior.from_pretrained(tmp_path, quantization="8bit", **OPTIONS)
    four = ActionPrior.from_pretrained(tmp_path, quantization="4bit", **OPTIONS)
    assert torch.equal(four(frames).token_ids, four.reference(frames).token_ids)
