"""What a VLM is said to take, compared with the bytes of the real objects on the CPU."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import ACTIONS, SIZES, frames_for, open_prior, write_checkpoint

from covr_fast.live_bytes import LiveBytes, nbytes, tensors_in
from covr_fast.vlm import ActionPrior, TunerConfig, VLMTuner
from covr_fast.vlm.finetune import round as rounds
from covr_fast.vlm.finetune.held_out import served_nll
from covr_fast.vlm.finetune.lora import trainable
from covr_fast.vlm.finetune.objective import AnswerModel, RoundImages, Samples, weighted_loss
from covr_fast.vlm.footprint import Request, footprint
from covr_fast.vlm.footprint import _model as model_of_footprint
from covr_fast.vlm.mode import own_mode
from covr_fast.vlm.model import resample

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import random_qwen

ROWS, MICRO = 5, 4
LORA = TunerConfig(lora_rank=4, micro_batch=MICRO, epochs=1, batch_size=4, held_out=0.0)
FULL = replace(LORA, mode="full", average=0.9)


def parts(model: str | Path, tuner: TunerConfig = LORA, **changes) -> dict[str, int]:
    size = SIZES.get(Path(model).name, (64, 64))
    options = {"rows": ROWS, "samples": 10, "prompt": "Drive.", "device_type": "cpu"} | changes
    found = footprint(Request(str(model), 2, size, tuner=tuner, **options))
    return {part.name: part.nbytes for part in (*found.serving, *found.tuning)}


def base_bytes(prior: ActionPrior) -> int:
    return nbytes([*prior.backbone.model.parameters(), *prior.backbone.model.buffers()])


@pytest.mark.parametrize("config", [LORA, FULL], ids=["lora", "full"])
def test_weights_and_caches_are_those_of_the_real_objects(checkpoint, config):
    told = parts(checkpoint, config)
    prior, frames = open_prior(checkpoint), frames_for(checkpoint, ROWS)
    assert told["base weights"] == base_bytes(prior)
    tuner = VLMTuner(prior, config)
    prior(frames)
    copied = [m for m in prior.backbone.decoder.layers.modules() if type(m) is torch.nn.Linear]
    copied = [m for m in copied if m.weight.shape[0] > 4 < m.weight.shape[1]]  # without LoRA's factors
    biases = [m.bias for m in copied if m.bias is not None]
    assert told["served decoder"] >= nbytes([*(m.weight for m in copied), *biases])
    assert told["served decoder"] == nbytes(
        tensors_in(prior._weights.transformer), without=tensors_in(prior.backbone.model)
    )
    (decoder,) = prior._decoders.values()
    (cache,) = decoder._caches.values()
    assert told["KV caches"] == 2 * sum(t.nbytes for layer in cache.layers for t in layer)
    trained = sum(w.nbytes for w in trainable(tuner._backbone.model))
    assert told["trained weights"] == pytest.approx(trained, rel=0.01)  # and buffers
    assert told["gradients"] == trained
    assert "masters" not in told  # in float32 they are the weights
    assert told.get("adapters", trained) == trained
    assert told["snapshots"] == (3 if config.average else 2) * trained


@pytest.mark.parametrize("config", [LORA, FULL], ids=["lora", "full"])
def test_the_state_of_adamw_is_that_of_a_real_round(checkpoint, config, monkeypatch):
    made = []

    class Kept(torch.optim.AdamW):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    told = parts(checkpoint, config)
    monkeypatch.setattr(rounds.torch.optim, "AdamW", Kept)
    tuner = VLMTuner(open_prior(checkpoint), config)
    tuner.start(frames_for(checkpoint), ACTIONS, torch.ones(4))
    state = [x for each in made[0].state.values() for name, x in each.items() if name != "step"]
    moments = nbytes(state)
    if (checkpoint.name, config.mode) == ("llava", "full"):
        # The last layer of its tower is not used: without a gradient it has no moments.
        assert 0.8 * told["AdamW"] < moments < told["AdamW"]
    else:
        assert told["AdamW"] == moments > 0


@pytest.fixture
def resized_as_on_a_cpu(monkeypatch):
    """A GPU resizes more frames at a time, in larger blocks."""

    def forget():
        resample.band.cache_clear()
        model_of_footprint.cache_clear()

    monkeypatch.setattr(resample, "_kind", lambda device: "cpu")
    forget()
    yield
    forget()


def micro_batch(prior: ActionPrior, config: TunerConfig, frames: torch.Tensor):
    """Of a real micro-batch: bytes that autograd saves for backward, besides weights, and the most alive; the
    most alive while as many held-out samples are judged; the most that a step of AdamW needs besides."""
    tuner = VLMTuner(prior, config)
    actions = torch.full((MICRO, 2), -0.4)
    actions[0] = 0.4
    samples = Samples.build(prior.grammar, frames, actions, torch.ones(MICRO))
    model = AnswerModel(
        tuner._backbone, prior.layout(tuple(frames.shape[2:])), checkpointing=config.gradient_checkpointing
    )
    saved, rows = [], torch.arange(MICRO)
    weights = list(tuner._backbone.model.parameters())
    with own_mode(prior.device, grad=True):
        for weight in trainable(tuner._backbone.model):
            weight.grad = torch.zeros_like(weight)

        def keep(tensor):
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), LiveBytes("cpu") as memory:
            loss = weighted_loss(model, samples, rows, model.image(frames), samples.valid_tokens(rows), 0.0)
        kept = nbytes(saved, without=weights)
        saved.clear()
        with memory:
            loss.backward()
        del loss
        images = RoundImages(model, samples, rows, replace(config, shift=1), torch.Generator())
        with LiveBytes("cpu") as held_out:
            served_nll(tuner._backbone, model.layout, samples, rows, images, MICRO)
        trained = trainable(tuner._backbone.model)
        optimizer = torch.optim.AdamW(trained, foreach=True)
        optimizer.step()
        with LiveBytes("cpu") as step:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
    return kept, memory.peak, held_out.peak, step.peak


@pytest.mark.parametrize(
    "config",
    [LORA, FULL, replace(LORA, gradient_checkpointing=True), replace(FULL, packing="off")],
    ids=["lora", "full", "checkpointing", "padded"],
)
def test_activations_are_those_of_a_real_micro_batch(checkpoint, config, resized_as_on_a_cpu):
    told = parts(checkpoint, config)
    kept, peak, *others = micro_batch(open_prior(checkpoint), config, frames_for(checkpoint, MICRO))
    assert told["activations"] == pytest.approx(max(peak, *others), rel=0.1)
    # Pixels from numpy (LLaVA's processor) are saved, but no operation of torch has made them.
    assert (0.1 if config.gradient_checkpointing else 0.8) * peak < kept < 1.05 * peak


def test_a_larger_micro_batch_and_larger_frames_take_more():
    told = parts("nano", replace(LORA, micro_batch=16))
    more = parts("nano", replace(LORA, micro_batch=32))
    assert 1.7 < more["activations"] / told["activations"] < 2
    larger = footprint(Request("nano", 2, (112, 112), ROWS, 10, LORA, device_type="cpu"))
    assert larger.image_tokens == 16
    assert {p.name: p.nbytes for p in larger.tuning}["image features"] == 10 * 16 * 192 * 4


def test_half_precision_has_float32_masters():
    told = parts("nano", FULL, dtype=torch.bfloat16)
    weights = told["trained weights"] / 2
    for name, numbers in {"masters": 1, "gradients": 1, "AdamW": 2}.items():
        assert told[name] == pytest.approx(4 * numbers * weights, rel=0.01)
    assert told["snapshots"] == pytest.approx((2 + 2 + 4) * weights, rel=0.01)  # the average is in float32
    assert "masters" not in parts("nano", LORA, dtype=torch.bfloat16)  # adapters are in float32


def test_a_larger_image_takes_more_tokens():
    found = footprint(Request("nano", 2, (56, 56), ROWS, 10, LORA, image_size=112, device_type="cpu"))
    assert found.image_tokens == 16


def test_confidences_take_a_forward_over_the_trees_of_all_numbers():
    assert parts("nano", confidence=True)["answering"] > 1.2 * parts("nano")["answering"]


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights_are_as_large_as_those_of_bitsandbytes(bits, tmp_path):
    checkpoint = write_checkpoint("qwen2_vl", tmp_path)
    told = parts(checkpoint, quantization=f"{bits}bit")
    prior = open_prior(checkpoint, quantization=f"{bits}bit")
    states = []
    for module in prior.backbone.model.modules():
        if (state := getattr(module, "quant_state", None)) is not None:
            states += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        elif type(state := getattr(module, "state", None)).__name__ == "MatmulLtState":
            states += [state.CB, state.SCB]
    stored = nbytes([*states, *prior.backbone.model.parameters(), *prior.backbone.model.buffers()])
    assert told["base weights"] == pytest.approx(stored, rel=0.01)
    assert told["served decoder"] == 0


def test_the_average_is_one_more_snapshot_and_shifted_frames_keep_no_features():
    told, other = parts("nano"), parts("nano", replace(LORA, average=0.9, shift=4))
    assert other["snapshots"] == 1.5 * told["snapshots"]
    assert told["image features"] == 10 * 4 * 192 * 4  # samples, tokens, numbers, bytes
    assert other["image features"] == 0


def test_the_shapes_of_a_3b_model(tmp_path):
    words = random_qwen.tokenizer()
    config = random_qwen.configuration(random_qwen.SHAPES["qwen-3b-random"], words)
    random_qwen.write_processor(tmp_path, config, words)
    found = footprint(Request(str(tmp_path), 2, (84, 84), 32, 1000, TunerConfig()))
    told = {part.name: part for part in (*found.serving, *found.tuning)}
    assert (found.image_tokens, found.dtype) == (9, torch.bfloat16)
    assert told["base weights"].how.startswith("3,754,622,976 weights of 2 bytes")
    gigabytes = {name: part.nbytes / 1e9 for name, part in told.items()}
    assert gigabytes["base weights"] == pytest.approx(7.51, abs=0.01)
    assert "LoRA beside the weights; 5.55 once" in told["served decoder"].how
    # LoRA in bfloat16; the first factors are joined, and kept one by one
    assert 0.48 < gigabytes["served decoder"] < 0.96
    assert gigabytes["adapters"] == pytest.approx(0.958, abs=0.001)
    # 36 layers of 2 heads of 128 for keys and for values, in 63 rows of 1, 2, 4, ... 32
    length = found.prompt_tokens + 16
    assert told["KV caches"].nbytes == 36 * 2 * 2 * 128 * 2 * 63 * length


def test_an_adapter_is_opened_on_its_base_by_shapes(checkpoint, tmp_path):
    prior = open_prior(checkpoint)
    VLMTuner(prior, LORA)
    prior.save_pretrained(tmp_path / "adapter")
    told = parts(tmp_path / "adapter")
    assert {n: told[n] for n in ("base weights", "adapters")} == {
        "base weights": base_bytes(open_prior(checkpoint)),
        "adapters": sum(w.nbytes for w in trainable(prior.backbone.model)),
    }


def test_weights_in_the_files_are_compared(tmp_path):
    checkpoint = write_checkpoint("qwen2_vl", tmp_path)
    request = Request(str(checkpoint), 2, (60, 84), ROWS, 10, LORA, prompt="Drive.")
    assert footprint(request).serving[0].how.endswith("as many as its files hold")
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 2
    config["text_config"].pop("layer_types", None)
    (checkpoint / "config.json").write_text(json.dumps(config))
    model_of_footprint.cache_clear()
    assert "but its files hold" in footprint(request).serving[0].how


@pytest.mark.needs_cuda
@pytest.mark.parametrize("config", [LORA, FULL], ids=["lora", "full"])
def test_the_peak_of_a_round_on_a_gpu(config, tmp_path):
    """Of a model of 100 M weights in bfloat16: the parts of the round against CUDA's allocator."""
    shape = copy.deepcopy(random_qwen.SHAPES["qwen-3b-random"])
    shape["text"] |= {
        "num_hidden_layers": 4,
        "vocab_size": 8192,
        "hidden_size": 1024,
        "num_attention_heads": 8,
    }
    shape["text"]["intermediate_size"] = 4096
    shape["vision"] |= {"depth": 2, "out_hidden_size": 1024, "fullatt_block_indexes": [1]}
    words = random_qwen.tokenizer()
    model_config = random_qwen.configuration(shape, words)
    random_qwen.write_processor(tmp_path, model_config, words)
    config = replace(config, batch_size=16, micro_batch=16)
    found = footprint(Request(str(tmp_path), 2, (84, 84), 16, 16, config))
    told = sum(p.nbytes for p in found.tuning if p.name != "frames")
    name = f"of this test, {config.mode}"  # random_qwen keeps a model by its name, and a tuner changes it
    random_qwen.SHAPES[name] = shape
    prior = random_qwen.open_prior(name, action_dim=2, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated()
    adapters = sum(p.nbytes for p in found.serving if p.name == "adapters")
    tuner = VLMTuner(prior, config)
    actions = torch.full((16, 2), -0.4)
    actions[0] = 0.4
    tuner.start(torch.zeros(16, 3, 84, 84, dtype=torch.uint8, device="cuda"), actions, torch.ones(16))
    measured = torch.cuda.max_memory_allocated() - before - adapters
    held = torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    workspaces = held - torch.cuda.memory_allocated()  # 34 MB a stream: the footprint has 1 GB for such
    parts = {p.name: p.nbytes for p in found.tuning}
    assert told == pytest.approx(measured - workspaces, rel=0.2), (parts, workspaces)
