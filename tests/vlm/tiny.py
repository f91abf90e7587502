"""Tiny random checkpoints of every supported architecture, written to disk by their own classes."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BitsAndBytesConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from covr_fast.vlm import ActionPrior
from covr_fast.vlm.finetune.objective import IGNORE, Samples
from covr_fast.vlm.model.nano import SPECIAL_TOKENS, write_nano

ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
}
QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOL_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def byte_tokenizer(template: str, special: tuple[str, ...], end: str) -> PreTrainedTokenizerFast:
    """Bytes and single digits, as the tokenizers of these models have them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(piece, special=True) for piece in (*special, "<pad>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=end, pad_token="<pad>", chat_template=template
    )


def _save(directory: Path, model_class: Any, config: Any, words: Any, files: dict[str, dict]) -> None:
    config.text_config.vocab_size = len(words)
    config.text_config.pad_token_id = words.pad_token_id
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    model.save_pretrained(directory)
    words.save_pretrained(directory)
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))


def write_qwen2_5_vl(directory: Path) -> None:
    write_nano(directory, seed=0)


def _write_qwen(
    directory: Path, model_class: Any, config_class: Any, vision: dict, rope: dict, image: dict
) -> None:
    words = byte_tokenizer(QWEN_TEMPLATE, SPECIAL_TOKENS, "<|im_end|>")
    at = words.convert_tokens_to_ids
    config = config_class(
        vision_config={"depth": 3, "num_heads": 4, "initializer_range": 0.2} | vision,
        text_config=TEXT | {"rope_parameters": ROPE | rope},
        image_token_id=at("<|image_pad|>"),
        video_token_id=at("<|video_pad|>"),
        vision_start_token_id=at("<|vision_start|>"),
        vision_end_token_id=at("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    pixels = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112},
        "merge_size": 2,
        "temporal_patch_size": 2,
    }
    _save(directory, model_class, config, words, {"preprocessor_config.json": pixels | image})


def write_qwen2_vl(directory: Path) -> None:
    vision = {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "patch_size": 14}
    rope = {"mrope_section": [2, 3, 3]}
    _write_qwen(directory, Qwen2VLForConditionalGeneration, Qwen2VLConfig, vision, rope, {"patch_size": 14})


def write_qwen3_vl(directory: Path) -> None:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "patch_size": 16,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    rope = {"mrope_section": [3, 3, 2], "mrope_interleaved": True}
    mean = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 16}
    _write_qwen(directory, Qwen3VLForConditionalGeneration, Qwen3VLConfig, vision, rope, mean)


def write_smolvlm(directory: Path) -> None:
    special = ("<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>", "<image>")
    words = byte_tokenizer(SMOL_TEMPLATE, special, "<end_of_utterance>")
    config = SmolVLMConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
            "initializer_range": 0.2,
        },
        text_config=LlamaConfig(**TEXT, rope_parameters=ROPE),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=4,
    )
    pixels = {
        "image_processor_type": "SmolVLMImageProcessor",
        "size": {"longest_edge": 128},
        "max_image_size": {"longest_edge": 64},
    }
    files = {
        "preprocessor_config.json": pixels,
        "processor_config.json": {"processor_class": "SmolVLMProcessor", "image_seq_len": 4},
    }
    _save(directory, SmolVLMForConditionalGeneration, config, words, files)


def write_llava(directory: Path) -> None:
    words = byte_tokenizer(LLAVA_TEMPLATE, ("<s>", "</s>", "<image>"), "</s>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
            projection_dim=32,
            initializer_range=0.2,
        ),
        text_config=LlamaConfig(**TEXT, rope_parameters=ROPE),
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    pixels = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 56},
        "crop_size": {"height": 56, "width": 56},
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": 14,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    files = {"preprocessor_config.json": pixels, "processor_config.json": processor}
    _save(directory, LlavaForConditionalGeneration, config, words, files)


WRITERS = {
    "qwen2_5_vl": write_qwen2_5_vl,
    "qwen2_vl": write_qwen2_vl,
    "qwen3_vl": write_qwen3_vl,
    "smolvlm": write_smolvlm,
    "llava": write_llava,
}
SIZES = {"qwen2_vl": (60, 84), "qwen2_5_vl": (84, 84)}
"""Height and width of frames for these; 64x64 for the others."""
ACTIONS = torch.tensor([[0.1, -0.2], [1.0, 0.0], [-1.0, 0.55], [0.3, 0.3]])

ROWWISE = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
"""8 bits without LLM.int8()'s outliers, which are those of a whole batch: rows are independent."""


def write_checkpoint(name: str, parent: Path) -> Path:
    """A new directory with a tiny checkpoint, named after its architecture."""
    directory = parent / name
    directory.mkdir()
    WRITERS[name](directory)
    return directory


def open_prior(model: Any, **options: Any) -> ActionPrior:
    return ActionPrior.from_pretrained(model, action_dim=2, prompt="Drive.", device="cpu", **options)


def make_nano(**options: Any) -> ActionPrior:
    return ActionPrior.from_pretrained("nano", action_dim=2, device="cpu", **options)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_frames(size: tuple[int, int], count: int = 4, seed: int = 0) -> torch.Tensor:
    """uint8[count, 3, H, W]"""
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=seeded(seed))


def frames_for(checkpoint: Path, count: int = 4) -> torch.Tensor:
    return random_frames(SIZES.get(checkpoint.name, (64, 64)), count)


def weights_of(prior_or_tuner: Any) -> list[torch.Tensor]:
    """Copies of all weights."""
    if isinstance(prior_or_tuner, ActionPrior):
        backbone = prior_or_tuner.backbone
    else:
        backbone = prior_or_tuner._backbone
    return [p.detach().clone() for p in backbone.model.parameters()]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def model_loss(prior: ActionPrior, frames: torch.Tensor) -> torch.Tensor:
    """The loss of the (peft) model's own forward on 4 frames, with `ACTIONS` as labels."""
    backbone = prior.backbone
    samples = Samples.build(prior.grammar, frames, ACTIONS, torch.ones(4))
    inputs = backbone.process(prior.text, frames)
    prompt = inputs["input_ids"]
    inputs["input_ids"] = torch.cat((prompt, samples.answers), 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["labels"] = torch.cat((torch.full_like(prompt, IGNORE), samples.labels), 1)
    if "mm_token_type_ids" in inputs:
        padding = (0, samples.answers.shape[1])
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], padding)
    return backbone.model(**inputs).loss
