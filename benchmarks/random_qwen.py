"""Qwen2.5-VL with random weights, made on the device in seconds: the speed of a real model without its files.

`qwen-3b-random` has the shape of Qwen2.5-VL-3B-Instruct. Its tokenizer knows the words of the prompts here
and single digits, so prompts and answers have about as many tokens as with the real one.
"""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2_5_VLConfig
from transformers import Qwen2_5_VLForConditionalGeneration as Model

from covr_fast.vlm import ActionPrior
from covr_fast.vlm.answer.prompt import default_prompt
from covr_fast.vlm.model.attention import choose_attention
from covr_fast.vlm.model.backbones import QwenVL
from covr_fast.vlm.model.loading import Settings
from covr_fast.vlm.model.nano import CHAT_TEMPLATE, SPECIAL_TOKENS
from covr_fast.vlm.model.processor import load_processor, quiet

TASK = (
    "You drive a race car on a track that is seen from above. The grey band is the road, green is grass, and "
    "red and white corners mark sharp turns. The car is the small red shape near the bottom of the image. "
    "Keep it in the middle of the road, slow down before sharp turns, speed up on straight parts. The first "
    "number steers, from -1 (left) to 1 (right); the second is the pedal, from -1 (brake) to 1 (gas). "
    "Answer in this format: Action: [0.40, -0.30]"
)

PATCHES = {"patch_size": 14, "temporal_patch_size": 2}
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "qwen-3b-random": {
        "vision": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "text": {
            "hidden_size": 2048,
            "intermediate_size": 11_008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151_936,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
    },
    "qwen-tiny-random": {
        "vision": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        "text": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
    },
}


def open_prior(model: str, *, action_dim: int, device: str, **options: Any) -> ActionPrior:
    """`ActionPrior.from_pretrained`, which here also knows the names in SHAPES."""
    if model not in SHAPES:
        return ActionPrior.from_pretrained(model, action_dim=action_dim, device=device, **options)
    return random_prior(model, action_dim, torch.device(device), **options)


def random_prior(
    name: str,
    action_dim: int,
    device: torch.device,
    *,
    prompt: str | None = None,
    decimals: int = 2,
    graph: bool = False,
) -> ActionPrior:
    """A prior of a shape in SHAPES; its weights come from the default generator of the device."""
    model, processor = random_model(name, device)
    settings = Settings(name, 0, action_dim, decimals, prompt, str(model.dtype).removeprefix("torch."))
    return ActionPrior(QwenVL(model, processor), settings, graph=graph)


@cache
def random_model(name: str, device: torch.device) -> tuple[Model, Any]:
    """The model and its processor, which all priors of the process share: a tuner's adapters, too."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    words = tokenizer()
    config = configuration(SHAPES[name], words)
    with tempfile.TemporaryDirectory() as folder, quiet():
        write_processor(Path(folder), config, words)
        processor = load_processor(folder, config)
    with device, quiet():
        attention = choose_attention("auto", device, dtype).name
        model = Model._from_config(config, dtype=dtype, attn_implementation=attention).eval()
    model.generation_config = GenerationConfig(
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id
    )
    model.name_or_path = config.name_or_path = name
    return model, processor


def configuration(shape: dict[str, dict[str, Any]], words: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    at = words.convert_tokens_to_ids
    vision = PATCHES | {"spatial_merge_size": 2, "window_size": 112, "tokens_per_second": 2}
    text = {"max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
    ends = {"bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    return Qwen2_5_VLConfig(
        vision_config=vision | shape["vision"],
        text_config=text | ends | shape["text"],
        tie_word_embeddings=True,
        image_token_id=at("<|image_pad|>"),
        video_token_id=at("<|video_pad|>"),
        vision_start_token_id=at("<|vision_start|>"),
        vision_end_token_id=at("<|vision_end|>"),
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of the prompts is a token; digits stand alone, as Qwen's do."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    corpus = ["user\n", "assistant\n", TASK, *(default_prompt(dim, 2) for dim in (1, 2, 3))]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(2 * corpus, trainer)
    made.add_special_tokens([AddedToken(piece, special=True) for piece in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def write_processor(folder: Path, config: Qwen2_5_VLConfig, words: PreTrainedTokenizerFast) -> None:
    """The files that a processor is opened from, with the image settings of Qwen2.5-VL's."""
    config.save_pretrained(folder)
    words.save_pretrained(folder)
    pixels = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(PATCHES | pixels))
