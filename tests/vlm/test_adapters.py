"""peft's adapters: fast answers and tuning losses are those of peft's forward, or the model is refused."""

import copy
import json

import peft
import pytest
import torch
from peft import LoraConfig, PeftMixedModel, get_peft_model
from tiny import ACTIONS, equal, make_nano, model_loss, open_prior, random_frames, seeded, write_checkpoint
from torch import nn

from covr_fast.vlm import ActionPrior, TunerConfig, VLMTuner
from covr_fast.vlm.finetune.lora import snapshot, trainable
from covr_fast.vlm.finetune.objective import AnswerModel, RoundImages, Samples, weighted_loss
from covr_fast.vlm.model.adapters import LAYERWISE, check_adapter, linear_beside_lora, merged_linear

QUICK = {"lora_rank": 4, "epochs": 1, "batch_size": 4, "micro_batch": 4, "learning_rate": 1e-2}


def randomize(parameters) -> None:
    """Fresh adapters mostly change nothing."""
    generator = seeded(0)
    with torch.no_grad():
        for p in parameters:
            if p.is_floating_point():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))


def adapt(prior: ActionPrior, config) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(prior.backbone.model, config)
    randomize(trainable(model))
    prior.backbone.model = model


def seeing(prior: ActionPrior) -> list[str]:
    """Names of the layers that make image tokens: patch embedding, vision tower, merger or projector."""
    backbone = prior.backbone
    others = {id(module) for module in (*backbone.decoder.modules(), backbone.head)}
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return [
        name
        for name, module in backbone.base.named_modules()
        if type(module) in kinds and id(module) not in others
    ]


def lora(prior: ActionPrior, **options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": prior.backbone.lora_targets} | options)


PLACES = {
    "dora": lambda prior: lora(prior, use_dora=True),
    "lora_bias": lambda prior: lora(prior, lora_bias=True),
    "vision": lambda prior: lora(prior, target_modules=seeing(prior), use_dora=True),
    "patch embedding": lambda prior: lora(prior, target_modules=[seeing(prior)[0]]),
    "head": lambda prior: lora(prior, target_modules=["lm_head"]),
    "embeddings": lambda prior: lora(prior, target_modules=["embed_tokens"]),
    "tokens": lambda prior: lora(prior, trainable_token_indices=list(range(4, 60))),
    "whole head": lambda prior: lora(prior, modules_to_save=["lm_head"]),
    "whole embeddings": lambda prior: lora(prior, modules_to_save=["embed_tokens"]),
    "whole layers": lambda prior: lora(
        prior, target_modules=["q_proj"], modules_to_save=["down_proj", "input_layernorm"]
    ),
    "oft": lambda prior: peft.OFTConfig(oft_block_size=8, target_modules=prior.backbone.lora_targets),
}


@pytest.mark.parametrize("place", PLACES)
def test_answers_and_losses_on_every_backbone(opened, place):
    prior, frames = opened
    plain = model_loss(prior, frames).item()
    adapt(prior, PLACES[place](prior))
    assert abs(model_loss(prior, frames).item() - plain) > 1e-4, "the adapter changes nothing"
    assert torch.equal(prior(frames).token_ids, prior.reference(frames).token_ids)
    check_loss(prior, frames)


def check_loss(prior: ActionPrior, frames: torch.Tensor) -> None:
    """The tuning loss and its gradients against the peft model's own forward with labels."""
    samples = Samples.build(prior.grammar, frames, ACTIONS, torch.ones(4))
    rows = torch.arange(4)
    model = AnswerModel(prior.backbone, prior.layout(tuple(frames.shape[2:])), checkpointing=False)
    ours = weighted_loss(model, samples, rows, model.image(frames), samples.valid_tokens(rows), 0.0)
    true = model_loss(prior, frames)
    torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-5)

    weights = trainable(prior.backbone.model)
    gradients = (torch.autograd.grad(loss, weights, allow_unused=True) for loss in (ours, true))
    pairs = [(a, b) for a, b in zip(*gradients, strict=True) if a is not None or b is not None]
    assert pairs
    total = torch.stack([b.norm() for _, b in pairs]).norm()
    for a, b in pairs:
        assert (a - b).norm() < 2e-3 * b.norm() + 1e-5 * total


@pytest.mark.parametrize("place", [place for place in PLACES if place != "lora_bias"])
def test_full_training_begins_with_what_the_adapter_knew(opened, place, tmp_path):
    """Where head and embeddings share a matrix, an adapter of one leaves the other alone."""
    prior, frames = opened
    adapt(prior, PLACES[place](prior))
    loss, answers = model_loss(prior, frames).item(), prior(frames).token_ids
    VLMTuner(prior, TunerConfig(mode="full", **QUICK))
    prior.save_pretrained(tmp_path / "full")
    for folded in (prior, open_prior(tmp_path / "full")):
        assert model_loss(folded, frames).item() == pytest.approx(loss, rel=1e-4)
        assert torch.equal(folded(frames).token_ids, answers)


def test_a_bias_that_the_base_has_no_place_for_is_not_folded_in(opened):
    prior, frames = opened
    adapt(prior, PLACES["lora_bias"](prior))
    answers = prior(frames).token_ids
    with pytest.raises(ValueError, match=r"lora_bias=True cannot be folded .* take mode='lora'"):
        VLMTuner(prior, TunerConfig(mode="full", **QUICK))
    prior.weights_changed()
    assert torch.equal(prior(frames).token_ids, answers)


def test_tied_adapters_are_served_and_not_tuned(tmp_path):
    prior, frames = open_prior(write_checkpoint("qwen2_vl", tmp_path)), random_frames((60, 84))
    adapt(prior, lora(prior, target_modules=["embed_tokens"], ensure_weight_tying=True))
    assert torch.equal(prior(frames).token_ids, prior.reference(frames).token_ids)
    with pytest.raises(ValueError, match=r"ensure_weight_tying.* take mode='full'"):
        VLMTuner(prior, TunerConfig(mode="lora", **QUICK))


def test_disabled_adapters_are_not_folded_in(nano, frames):
    answers = nano(frames).token_ids
    adapt(nano, lora(nano))
    nano.weights_changed()
    assert not torch.equal(nano(frames).token_ids, answers)
    nano.backbone.model.disable_adapter_layers()
    VLMTuner(nano, TunerConfig(mode="full", **QUICK))
    assert torch.equal(nano(frames).token_ids, answers)


@pytest.mark.parametrize("state", ["disabled", "two", "another name"])
def test_what_would_open_as_something_else_is_not_saved(state, nano, frames, tmp_path):
    folder = tmp_path / "saved"
    nano.save_pretrained(folder)
    before = nano(frames).token_ids
    name = "mine" if state == "another name" else "default"
    model = get_peft_model(nano.backbone.model, lora(nano), adapter_name=name)
    if state == "two":
        model.add_adapter("other", lora(nano))
    randomize(trainable(model))
    nano.backbone.model = model
    if state == "disabled":
        model.disable_adapter_layers()
    with pytest.raises(ValueError, match="only one adapter, named 'default', active and enabled"):
        nano.save_pretrained(folder)
    saved = ActionPrior.from_pretrained(folder, action_dim=2, device="cpu")
    assert torch.equal(saved(frames).token_ids, before)


@pytest.mark.parametrize("place", ["lora_bias", "vision", "head"])
def test_rounds_are_published(opened, place):
    prior, frames = opened
    adapt(prior, PLACES[place](prior))
    before = prior(frames).token_ids
    tuner = VLMTuner(prior, TunerConfig(**QUICK | {"epochs": 4}))
    tuner.start(frames.repeat(3, 1, 1, 1), torch.full((12, 2), 0.5), torch.ones(12))
    report = tuner.poll()
    assert report.loss_after < report.loss_before
    assert torch.equal(prior(frames).token_ids, before)
    tuner.publish()
    assert torch.equal(prior(frames).token_ids, prior.reference(frames).token_ids)


# ---------------------------------------------------------------------- every type, on nano

LAYERS = r".*language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
TYPES = {
    "LORA": {"r": 4},
    "ADALORA": {"init_r": 4, "target_r": 4, "total_step": 100, "tinit": 1, "tfinal": 1},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "post_attention_layernorm", "norm", "norm1", "ln_q"]},
    "OFT": {"oft_block_size": 8},
    "BOFT": {"boft_block_size": 8},
    "HRA": {"r": 4},
    "VERA": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    "VBLORA": {"r": 4, "vector_length": 32, "num_vectors": 16},
    "FOURIERFT": {"n_frequency": 200},
    "RANDLORA": {"r": 8, "target_modules": ["q_proj"]},
    "SHIRA": {"r": 4},
    "MISS": {"r": 4},
    "C3A": {"block_size": 16},
    "ROAD": {"group_size": 16},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": list(range(250, 380))},
}


def nano_adapted(config) -> ActionPrior:
    prior = make_nano()
    adapt(prior, config)
    return prior


def tune(prior: ActionPrior, frames: torch.Tensor, **options) -> VLMTuner:
    """A tuner that has finished a round."""
    tuner = VLMTuner(prior, TunerConfig(**QUICK | options))
    tuner.start(frames, torch.full((len(frames), 2), 0.5), torch.arange(float(len(frames))))
    return tuner


def test_all_types_are_tried():
    assert set(TYPES) == LAYERWISE


@pytest.mark.parametrize("kind", TYPES)
def test_every_type(kind, shared_nano, frames):
    cls = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    prior = nano_adapted(cls(**{"target_modules": LAYERS} | TYPES[kind]))
    with torch.no_grad():
        assert (model_loss(prior, frames[:4]) - model_loss(shared_nano, frames[:4])).abs() > 1e-5
    answers = prior(frames)
    assert torch.equal(answers.token_ids, prior.reference(frames).token_ids)
    if kind == "ADALORA":
        with pytest.raises(ValueError, match="AdaLoRA adapters are served but not tuned"):
            VLMTuner(prior)
    else:
        check_loss(prior, frames[:4])


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": [], "target_parameters": ["gate_proj.weight"]},
        {"kasa_config": peft.KasaConfig()},
        {"init_lora_weights": "mica"},
        {"use_rslora": True},
        {"bias": "all"},
        {"target_modules": ["lm_head"], "lora_bias": True},
        {"target_modules": ["down_proj"], "modules_to_save": ["self_attn"]},
        {"modules_to_save": ["mlp", "norm", "visual.patch_embed"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*visual.*", "modules_to_save": ["visual"]},
    ],
    ids=lambda options: next(reversed(options)),
)
def test_forms_of_lora(options, frames):
    prior = nano_adapted(LoraConfig(**{"r": 4, "target_modules": LAYERS} | options))
    assert torch.equal(prior(frames).token_ids, prior.reference(frames).token_ids)
    check_loss(prior, frames[:4])


# ---------------------------------------------------------------------- the state of adapters


def two_adapters() -> ActionPrior:
    prior = nano_adapted(LoraConfig(r=4, target_modules=LAYERS))
    model = prior.backbone.model
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=True))
    randomize(p for name, p in model.named_parameters() if ".other." in name)
    return prior


def test_several_active_adapters(frames):
    prior = two_adapters()
    seen = []
    for active in (["default"], ["other"], ["default", "other"]):
        prior.backbone.model.base_model.set_adapter(active)
        prior.weights_changed()
        seen.append(prior(frames).token_ids)
        assert torch.equal(seen[-1], prior.reference(frames).token_ids)
        check_loss(prior, frames[:4])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("disabled", [False, True])
def test_merged_and_disabled_adapters(merged, disabled, shared_nano, frames):
    prior = two_adapters()
    expected = (shared_nano if disabled else prior)(frames).token_ids
    if merged:
        prior.backbone.model.merge_adapter()
    if disabled:
        prior.backbone.model.base_model.disable_adapter_layers()
    prior.weights_changed()
    assert torch.equal(prior(frames).token_ids, expected)
    assert torch.equal(prior.reference(frames).token_ids, expected)


def test_a_disabled_copy_of_a_head(shared_nano, frames):
    config = LoraConfig(r=4, target_modules=LAYERS, modules_to_save=["lm_head", "embed_tokens"])
    prior = nano_adapted(config)
    prior.backbone.model.base_model.disable_adapter_layers()
    assert torch.equal(prior(frames).token_ids, shared_nano(frames).token_ids)
    assert torch.equal(prior.reference(frames).token_ids, shared_nano(frames).token_ids)


def test_serving_leaves_the_adapter_alone(frames):
    """Merging is done on a copy: the model's own weights stay as they are, bit for bit."""
    prior = nano_adapted(LoraConfig(r=4, target_modules=LAYERS, use_dora=True))
    before = copy.deepcopy(prior.backbone.model.state_dict())
    prior(frames)
    after = prior.backbone.model.state_dict()
    assert before.keys() == after.keys()
    assert equal(before.values(), after.values())


def test_dropout_is_off_in_answers_whatever_the_models_mode(frames):
    prior = nano_adapted(peft.LoHaConfig(r=4, target_modules=LAYERS, module_dropout=0.5))
    expected = prior(frames).token_ids
    for ask in (prior, prior.reference):
        prior.backbone.model.train()
        assert torch.equal(ask(frames).token_ids, expected)


def test_dropout_is_off_in_rounds_with_and_without_checkpointing(frames):
    losses = []
    for checkpointing in (False, True):
        prior = nano_adapted(LoraConfig(r=4, target_modules=LAYERS, lora_dropout=0.5))
        losses.append(tune(prior, frames, gradient_checkpointing=checkpointing).poll().loss_after)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("place", ["dora", "vision", "head", "tokens", "oft"])
def test_other_dtypes(place, dtype, frames):
    """peft keeps adapters of a bfloat16 model in float32."""
    prior = make_nano(dtype=dtype)
    adapt(prior, PLACES[place](prior))
    same = prior(frames).token_ids == prior.reference(frames).token_ids
    assert same.all() if dtype == torch.float64 else same.float().mean() > 0.7
    assert tune(prior, frames).poll().loss_after > 0


# ---------------------------------------------------------------------- layers that are not what they seem


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(layer: nn.Linear) -> nn.Linear:
    made = Doubled(layer.in_features, layer.out_features, bias=layer.bias is not None)
    made.load_state_dict(layer.state_dict())
    return made


def test_linear_layers_of_another_type_and_hooked_ones_are_called(frames):
    for change in ("type", "hook", "forward"):
        prior = make_nano()
        plain = prior.log_prob(frames, torch.zeros(len(frames), 2))
        for layer in (
            *(block.mlp for block in prior.backbone.decoder.layers),
            *(block.mlp for block in prior.backbone.tower.blocks),
        ):
            if change == "type":
                layer.down_proj = doubled(layer.down_proj)
            elif change == "hook":
                layer.down_proj.register_forward_hook(lambda _, __, out: 2 * out)
            else:
                forward = layer.down_proj.forward
                layer.down_proj.forward = lambda x, forward=forward: 2 * forward(x)
        if change == "type":
            prior.backbone.base.lm_head = doubled(prior.backbone.head)
        prior.weights_changed()
        assert not torch.allclose(prior.log_prob(frames, torch.zeros(len(frames), 2)), plain, atol=1e-2)
        assert torch.equal(prior(frames).token_ids, prior.reference(frames).token_ids)
        check_loss(prior, frames[:4])


def test_a_base_layer_of_another_type_is_not_merged():
    layer = nn.ModuleDict({"a": Doubled(4, 4)})
    adapted = get_peft_model(layer, LoraConfig(r=2, target_modules=["a"])).base_model.model["a"]
    assert merged_linear(adapted) is None
    assert linear_beside_lora(adapted) is None


# ---------------------------------------------------------------------- what is trained


def test_an_adapter_that_reaches_the_vision_tower_is_trained_there(frames):
    moved = []
    for cached in (False, True):
        prior = make_nano()
        adapt(prior, lora(prior, target_modules=[*seeing(prior), "q_proj"]))
        before = snapshot(trainable(prior.backbone.model))
        tune(prior, frames, cache_image_features=cached).publish()
        moved.append([a - b for a, b in zip(trainable(prior.backbone.model), before, strict=True)])
    assert all(step.any() for step in moved[1])
    assert equal(*moved)


def test_frozen_image_features_are_cached(frames):
    prior = nano_adapted(LoraConfig(r=4, target_modules=LAYERS))
    model = AnswerModel(prior.backbone, prior.layout((84, 84)), checkpointing=False)
    samples = Samples.build(prior.grammar, frames[:4], ACTIONS, torch.ones(4))
    arguments = (model, samples, torch.arange(4), TunerConfig(micro_batch=3), torch.Generator())
    assert RoundImages(*arguments)._kept is not None
    prior.backbone.tower.requires_grad_(True)
    assert RoundImages(*arguments)._kept is None


def test_merged_disabled_and_frozen_adapters_cannot_be_tuned():
    prior = nano_adapted(LoraConfig(r=4, target_modules=LAYERS))
    model = prior.backbone.model
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged adapters cannot be tuned: call unmerge_adapter"):
        VLMTuner(prior)
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match=r"disabled adapters cannot be tuned: call enable_adapter_layers"):
        VLMTuner(prior)
    VLMTuner(prior, TunerConfig(mode="full"))
    prior = nano_adapted(LoraConfig(r=4, target_modules=LAYERS))
    prior.backbone.model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen: unfreeze them, or set mode='full'"):
        VLMTuner(prior)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "kind", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT", "XLORA", "POLY", "NEW"]
)
def test_types_that_are_refused_before_anything_is_loaded(kind, tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": kind, "base_model_name_or_path": "/no/such/base"})
    )
    with pytest.raises(ValueError, match=f"adapters of type {kind} are not supported.*give one of .*LORA"):
        ActionPrior.from_pretrained(tmp_path, action_dim=2, device="cpu")


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=LAYERS, alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"),
        LoraConfig(target_modules=LAYERS, arrow_config=peft.ArrowConfig()),
    ],
)
def test_forms_of_lora_that_are_refused(config):
    with pytest.raises(ValueError, match=r"LoRA adapters with (alora|arrow)_\w+ are not supported"):
        check_adapter(config.to_dict())


def test_a_prompt_learning_adapter_is_refused_where_it_is_put_on(nano):
    base = nano.backbone.model
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, num_layers=3, token_dim=192, num_attention_heads=6
    )
    with pytest.raises(ValueError, match="adapters of type PREFIX_TUNING are not supported"):
        nano.backbone.model = get_peft_model(base, config)
    assert nano.backbone.model is base


def test_adapters_that_a_peft_model_does_not_hold_are_refused():
    config = LoraConfig(r=4, target_modules=["q_proj"])
    for put_on in (
        lambda model: model.add_adapter(config) or model,
        lambda model: PeftMixedModel(model, config),
    ):
        prior = make_nano()
        with pytest.raises(ValueError, match=r"holds adapters, but only a peft.PeftModel may"):
            prior.backbone.model = put_on(prior.backbone.model)
