"""The fast prior: the answers of `generate`, through the directory path, with clear errors."""

import gc
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny import make_nano, open_prior, random_frames, seeded

from covr_fast.vlm import ActionPrior
from covr_fast.vlm.answer.prompt import parse_action
from covr_fast.vlm.decode.transformer import Transformer
from covr_fast.vlm.model.nano import write_nano


@pytest.mark.parametrize("size", [(84, 84), (96, 96), (48, 64), (56, 140)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_fast_path_equals_generate(shared_nano, size, temperature):
    images = random_frames(size)
    fast = shared_nano(images, temperature=temperature, generator=seeded(1))
    slow = shared_nano.reference(images, temperature=temperature, generator=seeded(1))
    assert torch.equal(fast.token_ids, slow.token_ids)
    assert torch.equal(fast.action, slow.action)
    assert fast.text == slow.text
    assert fast.action.tolist() == [pytest.approx(parse_action(text)) for text in fast.text]
    if temperature:
        assert len(set(fast.text)) > 1


@pytest.mark.parametrize("action_dim, decimals", [(1, 1), (6, 2), (2, 3)])
def test_other_action_sizes(action_dim, decimals, frames):
    prior = ActionPrior.from_pretrained("nano", action_dim=action_dim, decimals=decimals, device="cpu")
    fast = prior(frames, temperature=0.7, generator=seeded(2))
    slow = prior.reference(frames, temperature=0.7, generator=seeded(2))
    assert fast.action.shape == (len(frames), action_dim)
    assert torch.equal(fast.token_ids, slow.token_ids)


def test_rows_do_not_depend_on_their_batch(shared_nano, frames):
    expected = shared_nano(frames).token_ids
    for rows in (0, 1, 2, 3, 4, slice(2), slice(3), slice(5), slice(1), slice(5)):
        images = frames[rows].view(-1, *frames.shape[1:])
        assert torch.equal(shared_nano(images).token_ids, expected[rows].view(len(images), -1))


def test_sampling_follows_the_generator(shared_nano, frames):
    def sample(seed):
        return shared_nano(frames, temperature=1.0, generator=seeded(seed)).token_ids

    assert torch.equal(sample(5), sample(5))
    assert not torch.equal(sample(5), sample(6))


def test_sampling_has_the_models_frequencies(shared_nano, frames):
    """The first choice of a thousand samples against the softmax that `generate`'s model gives."""
    prior = shared_nano
    inputs = prior.backbone.process(prior.text, frames[:1])
    opening = prior.grammar.opening[None]
    inputs["input_ids"] = torch.cat((inputs["input_ids"], opening), 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, opening.shape[1]))
    with torch.no_grad():
        logits = prior.backbone.base(**inputs).logits[0, -1]
    level = prior.grammar.levels[0]
    expected = torch.softmax(logits[level.tokens], 0)
    images = frames[:1].expand(200, -1, -1, -1)
    generator = seeded(0)
    drawn = torch.cat([prior(images, temperature=1.0, generator=generator).token_ids for _ in range(5)])
    first = drawn[:, len(prior.grammar.opening)]
    observed = (first[:, None] == level.tokens).float().mean(0)
    torch.testing.assert_close(observed, expected, atol=0.05, rtol=0)


def test_a_call_costs_one_forward_per_choice(shared_nano, frames, monkeypatch):
    """The prompt's prefix is not run again, forced tokens have no forward, nor does the last choice."""
    prior = shared_nano
    prior(frames)
    lengths = []
    forward = Transformer.__call__

    def counting(self, x, *arguments, **options):
        lengths.append(x.shape[1])
        return forward(self, x, *arguments, **options)

    monkeypatch.setattr(Transformer, "__call__", counting)
    prior(frames)
    layout, levels = prior.layout((84, 84)), prior.grammar.levels
    body = len(layout.body) + len(prior.grammar.opening)
    assert lengths == [body, *(1 + len(level.forced) for level in levels[:-1])]
    assert len(layout.prefix) > 20


def test_frame_sizes_share_the_merged_weights(nano, frames):
    """The decoder of a second size adds a prefix, a cache and angles, but no copy of the weights."""

    def storages():
        tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
        return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}

    small = frames[:1, :, :56, :56].contiguous()
    before = storages()
    nano(frames[:1])
    first = storages()
    nano(small)
    second = storages()
    layers = sum(p.numel() * p.element_size() for p in nano.backbone.decoder.layers.parameters())
    assert sum(first[at] for at in first.keys() - before.keys()) > 0.99 * layers
    assert sum(second[at] for at in second.keys() - first.keys()) < 0.2 * layers
    assert torch.equal(nano(small).token_ids, nano.reference(small).token_ids)


def test_nano_is_opened_like_any_directory(tmp_path, shared_nano, frames):
    write_nano(tmp_path, seed=0)
    opened = ActionPrior.from_pretrained(tmp_path, action_dim=2, device="cpu")
    assert torch.equal(opened(frames).token_ids, shared_nano(frames).token_ids)
    assert not torch.equal(make_nano(seed=1)(frames).token_ids, shared_nano(frames).token_ids)


def test_a_prompt_that_ends_like_an_answer_begins(tmp_path, frames):
    prior = make_nano(seed=3, decimals=1, prompt="Drive. Action: ")
    prior.save_pretrained(tmp_path)
    opened = ActionPrior.from_pretrained(tmp_path, action_dim=2, device="cpu")
    assert (opened.prompt, opened.settings.decimals) == ("Drive. Action: ", 1)
    assert torch.equal(opened(frames).token_ids, prior(frames).token_ids)
    assert torch.equal(opened.reference(frames).token_ids, prior(frames).token_ids)


def test_a_full_gpu_says_what_to_do(nano, frames, monkeypatch):
    def full(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(type(nano.backbone), "image_features", full)
    with pytest.raises(MemoryError, match="answering for 5 frames: ask about fewer at a time"):
        nano(frames)


def test_importing_the_package_does_not_import_transformers():
    code = "import sys, covr_fast.vlm; sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", ["./no/such", "/no/such", "no-such-model", "a/b/c"])
def test_missing_directory(name):
    with pytest.raises(FileNotFoundError, match="no model directory"):
        ActionPrior.from_pretrained(name, action_dim=2)


def test_images_of_another_dtype_or_layout(shared_nano, frames):
    for images, error, message in (
        (frames.float(), TypeError, "uint8"),
        (frames.numpy(), TypeError, "ndarray"),
        (frames.permute(0, 2, 3, 1), ValueError, "channels first"),
        (torch.zeros(2, 9, 84, 84, dtype=torch.uint8), ValueError, "9, 84, 84"),
        (frames[:0], ValueError, "at least one"),
    ):
        with pytest.raises(error, match=message):
            shared_nano(images)
    with pytest.raises(ValueError, match="temperature"):
        shared_nano(frames, temperature=-1.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decimals": 0}, ValueError, "decimals must be between 1 and 4, not 0"),
        ({"decimals": 5}, ValueError, "decimals must be between 1 and 4, not 5"),
        ({"decimals": np.int64(0)}, ValueError, "decimals must be between 1 and 4, not 0"),
        ({"decimals": 2.0}, TypeError, "decimals is 2.0: it must be an integer"),
        ({"decimals": np.float32(1)}, TypeError, "decimals is .*1.*: it must be an integer"),
        ({"decimals": True}, TypeError, "decimals is True: it must be an integer"),
        ({"decimals": "2"}, TypeError, "decimals is '2': it must be an integer"),
        ({"action_dim": 0}, ValueError, "action_dim must be at least 1, not 0"),
        ({"action_dim": 2.0}, TypeError, "action_dim is 2.0: it must be an integer"),
        ({"action_dim": True}, TypeError, "action_dim is True: it must be an integer"),
        ({"action_dim": None}, TypeError, "action_dim is None: it must be an integer"),
        ({"prompt": b"Drive."}, TypeError, "prompt must be text, not b'Drive.'"),
        ({"prompt": 5}, TypeError, "prompt must be text, not 5"),
    ],
)
def test_options_are_refused_before_a_model_is_looked_for(options, error, message):
    with pytest.raises(error, match=message):
        ActionPrior.from_pretrained("no/such/model", **{"action_dim": 2} | options)


def test_options_that_are_numpys(tmp_path, frames):
    options = {"action_dim": np.int64(2), "decimals": np.uint8(1)}
    prior = ActionPrior.from_pretrained("nano", device="cpu", **options)
    prior.save_pretrained(tmp_path)
    opened = ActionPrior.from_pretrained(tmp_path, action_dim=2, device="cpu")
    assert opened.settings.decimals == 1
    assert torch.equal(opened(frames).token_ids, prior(frames).token_ids)


def test_tokens_of_the_conversation_in_a_prompt(checkpoint):
    tokenizer = open_prior(checkpoint).backbone.tokenizer
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    assert tokenizer.eos_token in special
    assert any("image" in token for token in special)
    for token in special:
        with pytest.raises(ValueError, match=re.escape(f"the prompt holds {token!r}, which marks images")):
            ActionPrior.from_pretrained(checkpoint, action_dim=2, prompt=f"Drive{token}.", device="cpu")


def test_a_prompt_of_any_other_text(frames):
    prompt = "Fahre <left|right> \u2192 {{ x }} <image pad> 100% \n\n Action: [0.40, -0.30]"
    prior = make_nano(prompt=prompt)
    assert prompt in prior.text
    assert torch.equal(prior(frames).token_ids, prior.reference(frames).token_ids)


def test_a_directory_without_a_model_or_with_another_architecture(tmp_path):
    with pytest.raises(ValueError, match="cannot read a model configuration"):
        ActionPrior.from_pretrained(tmp_path, action_dim=2)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"'gpt2' is not supported.*qwen2_5_vl"):
        ActionPrior.from_pretrained(tmp_path, action_dim=2)


def test_the_folder_of_a_run_is_not_that_of_its_vlm(tmp_path):
    write_nano(tmp_path / "checkpoint" / "vlm", seed=0)
    with pytest.raises(
        ValueError, match=re.escape(f"the folder of a run: give that of its VLM, '{tmp_path}/ch")
    ):
        ActionPrior.from_pretrained(tmp_path, action_dim=2)


def test_a_saved_prompt_is_for_its_count_of_numbers(tmp_path):
    make_nano(prompt="Two numbers.").save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match="asks for 2 numbers: give action_dim=2, or another prompt"):
        ActionPrior.from_pretrained(tmp_path / "own", action_dim=3)
    assert ActionPrior.from_pretrained(tmp_path / "own", action_dim=3, prompt="Three.").action_dim == 3
    make_nano().save_pretrained(tmp_path / "default")  # whose prompt follows the count
    assert "3 numbers" in ActionPrior.from_pretrained(tmp_path / "default", action_dim=3).prompt


def test_a_chat_template_that_does_not_show_the_image(tmp_path):
    write_nano(tmp_path, seed=0)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'][0]['text'] }}")
    with pytest.raises(ValueError, match="puts no image token"):
        ActionPrior.from_pretrained(tmp_path, action_dim=2, device="cpu")


def test_attention_that_cannot_run_here():
    with pytest.raises(ValueError, match=r"flash_attention_2.*cannot run here.*cpu"):
        make_nano(attention="flash_attention_2")
    with pytest.raises(ValueError, match="not one of"):
        make_nano(attention="fast")
