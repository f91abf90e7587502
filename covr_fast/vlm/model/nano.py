"""`nano`: the Qwen2.5-VL architecture, small enough to run and learn on two CPU cores.

It is an ordinary checkpoint directory with random weights, so it runs through the same code as a real model.
With it the whole method runs anywhere, but it has no knowledge to give.
"""

import json
from pathlib import Path
from typing import Any

from ...words import MOTION_WORDS, all_prompts
from ..answer.prompt import JOINER, OPENING, default_prompt
from .folder import NANO_BASE

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Parts of the answer that are one token each, as in a vocabulary learned from such text: answers stay short.
ANSWER_TOKENS = (OPENING, JOINER, "0.", "1.", "-0.", "-1.")
VOCAB_SIZE = 768

# An image token covers 28x28 pixels, 2x2 patches of the vision tower: an 84x84 frame has 3x3 tokens.
PATCH_SIZE = 14
MERGE_SIZE = 2
VISION = {
    "depth": 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 4,
    "patch_size": PATCH_SIZE,
    "spatial_merge_size": MERGE_SIZE,
    "temporal_patch_size": 1,
    "window_size": 112,
    "fullatt_block_indexes": [1],
}
TEXT = {
    "hidden_size": 192,
    "intermediate_size": 448,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
    "tie_word_embeddings": False,
}
# With the usual 0.02, layers this narrow pass on so little of the image that learning starts slowly.
INITIALIZER_RANGE = 0.08


def write_nano(directory: str | Path, *, seed: int) -> None:
    """Writes the nano checkpoint, 2.3 M float32 weights drawn from `seed`, into an existing directory."""
    import torch
    from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    directory = Path(directory)
    tokenizer = build_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    ends = {
        "bos_token_id": token("<|im_start|>"),
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
    }
    config = Qwen2_5_VLConfig(
        vision_config=VISION
        | {"out_hidden_size": TEXT["hidden_size"], "initializer_range": INITIALIZER_RANGE},
        text_config=TEXT | ends | {"vocab_size": VOCAB_SIZE, "initializer_range": INITIALIZER_RANGE},
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # A seed gives other numbers in another dtype, so the process's default dtype must not be used.
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    image_processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112},
        "patch_size": PATCH_SIZE,
        "merge_size": MERGE_SIZE,
        "temporal_patch_size": VISION["temporal_patch_size"],
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(image_processor, indent=2))


def is_nano(model: str | Path) -> bool:
    """Whether `model` is "nano", a checkpoint of its shape, or an adapter on one; hub ids are not."""
    if str(model) == "nano":
        return True
    base = _json(Path(model) / "adapter_config.json").get("base_model_name_or_path")
    if base is not None and base != str(model):
        return Path(base).name == NANO_BASE or is_nano(base)
    text = _json(Path(model) / "config.json").get("text_config", {})
    shape = TEXT | {"vocab_size": VOCAB_SIZE}
    return all(text.get(name) == shape[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers"))


def _json(file: Path) -> dict[str, Any]:
    """The content of a file; empty if it is missing or damaged. Loading the model reports that."""
    try:
        content: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content


def build_tokenizer() -> Any:
    """A byte-level BPE tokenizer with merges learned from the prompts: it can write any text, and prompts are
    short. nano cannot read them, but each of their tokens costs it time."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS) - len(ANSWER_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    prompts = [default_prompt(dim, decimals) for dim in (1, 2, 3) for decimals in (1, 2)]
    corpus = ["user\n", "assistant", *prompts, *all_prompts(), MOTION_WORDS] * 2
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in ANSWER_TOKENS])
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
