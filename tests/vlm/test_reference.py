"""The reference decoder is the grammar's, whatever a checkpoint's generation config asks for."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import frames_for, open_prior, seeded

# Each of them changes what `generate` gives: other tokens, another length, another kind of result.
SHIPPED = {
    "penalties": {
        "repetition_penalty": 1.7,
        "encoder_repetition_penalty": 1.5,
        "no_repeat_ngram_size": 2,
        "exponential_decay_length_penalty": [1, 3.0],
    },
    "sampling": {"do_sample": True, "temperature": 1e-6, "top_k": 1, "top_p": 0.01, "min_p": 0.9},
    "forbidden and forced": {
        "suppress_tokens": list(range(10, 20)),
        "begin_suppress_tokens": [32, 66],
        "bad_words_ids": [[15], [16], [17, 18]],
        "forced_eos_token_id": 5,
        "forced_bos_token_id": 7,
        "sequence_bias": [[[13], -50.0]],
    },
    "lengths": {
        "max_new_tokens": 3,
        "min_new_tokens": 25,
        "max_length": 30,
        "min_length": 300,
        "max_time": 1e-9,
        "stop_strings": ["."],
    },
    "ends": {"eos_token_id": [15, 16, 17], "pad_token_id": 3},
    "results": {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_hidden_states": True,
        "num_return_sequences": 2,
        "num_beams": 2,
        "use_cache": False,
        "guidance_scale": 3.0,
    },
}


@pytest.fixture(scope="module")
def answered(checkpoint):
    """Frames, and the answers to them at two temperatures."""
    prior, frames = open_prior(checkpoint), frames_for(checkpoint, 6)
    return frames, {t: prior(frames, temperature=t, generator=seeded(3)).token_ids for t in (0.0, 1.0)}


@pytest.mark.parametrize("name", SHIPPED)
def test_answers_do_not_depend_on_the_generation_config(checkpoint, answered, name):
    frames, expected = answered
    file = checkpoint / "generation_config.json"
    original = file.read_text()
    file.write_text(json.dumps(json.loads(original) | SHIPPED[name]))
    try:
        prior = open_prior(checkpoint)
    finally:
        file.write_text(original)
    shipped = prior.backbone.base.generation_config
    for key in SHIPPED[name]:
        assert getattr(shipped, key) is not None, "the checkpoint's config was not read"
    for temperature, answer in expected.items():
        for ask in (prior, prior.reference):
            got = ask(frames, temperature=temperature, generator=seeded(3))
            assert torch.equal(got.token_ids, answer)
    assert prior.backbone.base.generation_config is shipped


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_a_generation_config_of_the_adapter_is_not_used_either(nano, frames, task):
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type=task)
    model = get_peft_model(nano.backbone.model, config)
    model.generation_config = nano.backbone.base.generation_config
    model.generation_config.repetition_penalty = 2.0
    nano.backbone.model = model
    assert torch.equal(nano(frames).token_ids, nano.reference(frames).token_ids)
