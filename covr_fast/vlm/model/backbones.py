"""The few things that differ between VLM architectures, behind one interface.

A `Backbone` is a loaded model with its processor. The decode loop and the tuner use it as: text tokens to
embeddings, frames to image features, embeddings plus a cache to hidden states, and a head. Everything is
reached through transformers' auto classes; a subclass holds what is particular to a family.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..mode import own_mode
from .adapters import bare, check_adapters, check_savable, disabled, untie, untouched
from .attention import register_segmented_sdpa
from .cache import Prefix
from .patches import PatchPixels
from .rows import Padded


@dataclass(frozen=True)
class ImageFeatures:
    """What the vision tower hands to the language model."""

    tokens: Tensor
    """[B, n, D]: the embeddings of each frame's n image tokens."""
    deep: tuple[Tensor, ...] = ()
    """[B, n, D] each: features added to the hidden states after the first decoder layers (Qwen3-VL)."""

    @property
    def requires_grad(self) -> bool:
        return any(x.requires_grad for x in (self.tokens, *self.deep))

    def rows(self, index: Tensor | slice) -> "ImageFeatures":
        return ImageFeatures(self.tokens[index], tuple(x[index] for x in self.deep))


class Backbone:
    """A VLM whose positions simply count up, such as LLaVA-1.5.

    Args:
        model: transformers' `...ForConditionalGeneration`, or a peft model around one.
        processor: its processor.

    Raises:
        ValueError: the model has an adapter that is not supported, or the processor no image token.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava",)
    lora_targets: ClassVar[str] = (
        r".*(language_model|text_model)\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
    )
    """Regular expression of the linear layers that LoRA adapts: all of the language model's."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token_id = self._find_image_token()
        self.adapter_has_embeddings = False
        """Whether the adapter was saved with embeddings of its own, which replace those of the base."""

    def _find_image_token(self) -> int:
        config = self.base.config
        token = getattr(config, "image_token_id", None)
        if token is None:
            token = getattr(config, "image_token_index", None)
        if token is None or getattr(self.processor, "image_token", None) is None:
            raise ValueError(
                f"{type(self.processor).__name__} has no image token, so no frame can be shown to it"
            )
        return int(token)

    @property
    def model(self) -> Any:
        return self._model

    @model.setter
    def model(self, model: Any) -> None:
        check_adapters(model)
        self._model = model.eval()  # what peft adds comes in training mode

    @property
    def adapted(self) -> bool:
        """Whether peft has wrapped the model with adapters."""
        from peft import PeftModel

        return isinstance(self.model, PeftModel)

    @property
    def base(self) -> Any:
        """The transformers model, without peft's wrapper."""
        return self.model.get_base_model() if self.adapted else self.model

    @property
    def source(self) -> str:
        """Where the weights without an adapter came from: "nano", an absolute directory or a hub id."""
        return str(self.base.config.name_or_path)

    @property
    def quantized(self) -> bool:
        """Whether weights are held in fewer bits than they compute in: only adapters can be trained then."""
        return getattr(self.base, "hf_quantizer", None) is not None

    def merged(self) -> "Backbone":
        """The same with an adapter folded into the weights, for good: this backbone's model is used up."""
        untie(self.base)
        model = self.model.unload() if disabled(self.model) else self.model.merge_and_unload()
        return type(self)(model, self.processor)

    @property
    def decoder(self) -> Any:
        """The language model: embeddings in, hidden states out."""
        return bare(self.base.get_decoder())

    @property
    def head(self) -> Any:
        """The module that makes logits of hidden states."""
        return bare(self.base.get_output_embeddings())

    @property
    def plain_head(self) -> nn.Linear | None:
        """The head, if its logits are products with the rows of a matrix and nothing else."""
        head = self.head
        return head if type(head) is nn.Linear and head.bias is None and untouched(head) else None

    @property
    def attention(self) -> str:
        """The attention implementation of the language model, by its name in transformers' registry."""
        return self.decoder.config._attn_implementation

    @attention.setter
    def attention(self, name: str) -> None:
        self.decoder.config._attn_implementation = name

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    def embed(self, tokens: Tensor) -> Tensor:
        """int64[...] -> [..., D]."""
        return self.base.get_input_embeddings()(tokens)

    def save(self, directory: Path) -> None:
        """Writes weights (or the adapter) and the processor into an empty directory."""
        if self.adapted:
            check_savable(self.model)
            # peft's default would look the base up on the hub.
            self.model.save_pretrained(directory, save_embedding_layers=self.adapter_has_embeddings)
            (directory / "README.md").unlink(missing_ok=True)  # a form for the model's author to fill in
        else:
            # transformers cannot undo what it did to weights that were quantized in the checkpoint.
            self.model.save_pretrained(directory, save_original_format=not self.quantized)
        self.processor.save_pretrained(directory)
        # It is in the processor's file, too; other tools look for it here, and for their video half.
        self.processor.image_processor.save_pretrained(directory)

    # ------------------------------------------------------------------ the prompt

    def render(self, prompt: str) -> str:
        """The conversation up to the answer. The task comes before the image, so that all frames share it.

        Raises:
            ValueError: the prompt holds a token that conversations are made of, or the template has no image.
        """
        if (token := self._structure_in(prompt)) is not None:
            raise ValueError(
                f"the prompt holds {token!r}, which marks images or turns in this model's conversations; it "
                "is put there for you: describe the task in words only"
            )
        content = [{"type": "text", "text": prompt}, {"type": "image"}]
        messages = [{"role": "user", "content": content}]
        # By the tokenizer: some processors would ask their video half, which is not loaded, for settings.
        text = self.tokenizer.apply_chat_template(
            messages,
            chat_template=getattr(self.processor, "chat_template", None),
            tokenize=False,
            add_generation_prompt=True,
        )
        if self.processor.image_token not in text:
            raise ValueError(
                f"the chat template of {type(self.processor).__name__} puts no image token into {text!r}"
            )
        return text

    def _structure_in(self, prompt: str) -> str | None:
        """A token in the prompt that this model's conversations are made of, such as an image's place."""
        for name in ("image_token", "video_token"):
            token = getattr(self.processor, name, None)
            if token and token in prompt:
                return token
        tokenizer, config = self.tokenizer, self.base.config
        special = set(tokenizer.all_special_ids)
        special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= {getattr(config, f"{kind}_token_id", None) for kind in ("vision_start", "vision_end")}
        special.discard(tokenizer.unk_token_id)  # stands for characters that the tokenizer does not know
        found = [i for i in tokenizer(prompt, add_special_tokens=False)["input_ids"] if i in special]
        return tokenizer.convert_ids_to_tokens(found[0]) if found else None

    def answer_context(self, text: str) -> str:
        """What an answer's tokens may depend on: the part of the rendered prompt that follows the image."""
        return text.rpartition(self.processor.image_token)[2]

    def process(self, text: str, images: list[Any]) -> Mapping[str, Tensor]:
        """The processor's own inputs for `model.generate`, one image and the same text per row."""
        return self.processor(text=[text] * len(images), images=images, return_tensors="pt")

    def positions(self, inputs: Mapping[str, Tensor], extra: int) -> Tensor:
        """Position ids [..., 1, S + extra] of one processed row followed by `extra` text tokens."""
        return torch.arange(inputs["input_ids"].shape[1] + extra)[None]

    # ------------------------------------------------------------------ the image

    def pixels(self, images: Tensor) -> Tensor:
        """uint8[B, 3, H, W] -> what `image_features` takes, its leading dimension a multiple of B."""
        arrays = list(images.permute(0, 2, 3, 1).cpu().numpy())
        return self.processor.image_processor(images=arrays, return_tensors="pt")["pixel_values"].to(
            self.device
        )

    def image_features(self, pixels: Tensor, batch: int, size: tuple[int, int]) -> ImageFeatures:
        """Image tokens of `batch` frames of `size` (height, width) from `pixels`."""
        features = self.base.get_image_features(pixel_values=pixels.to(self.dtype)).pooler_output
        if not isinstance(features, Tensor):
            features = torch.cat(tuple(features))
        return ImageFeatures(features.reshape(batch, -1, features.shape[-1]))

    # ------------------------------------------------------------------ the language model

    def empty_prefix(self) -> Prefix:
        """The keys and values of no tokens, for prompts that begin with the image."""
        config = self.decoder.config
        heads = config.num_key_value_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        empty = torch.empty(1, heads, 0, dim, dtype=self.dtype, device=self.device)
        return [(empty, empty)] * config.num_hidden_layers

    def hidden(
        self,
        embeddings: Tensor,
        positions: Tensor,
        rows: Padded,
        cache: Cache | None,
        *,
        image_at: Tensor | None = None,
        image: ImageFeatures | None = None,
    ) -> Tensor:
        """Last hidden states [B, n, D] of padded `embeddings` [B, n, D] behind what `cache` holds.

        Args:
            positions: [..., 1, n], the same in every row.
            rows: how the decoder takes them (`packing.arrange`), with the cache's prefix held.
            image_at: int64[m], the places among the n that are image tokens; with `image`.
        """
        if image_at is not None and image is not None:
            embeddings = embeddings.index_copy(1, image_at, image.tokens.to(embeddings.dtype))
        hidden = self.decoder(
            inputs_embeds=rows.packed(embeddings),
            position_ids=rows.positions(positions),
            past_key_values=cache,
            use_cache=cache is not None,
            **rows.attention(embeddings),
            **self._image_arguments(embeddings, rows, image_at, image),
        ).last_hidden_state
        return rows.padded(hidden)

    def _image_arguments(
        self, embeddings: Tensor, rows: Padded, image_at: Tensor | None, image: ImageFeatures | None
    ) -> dict[str, Any]:
        """What the decoder takes besides embeddings that hold the image."""
        return {}


class QwenVL(Backbone):
    """Qwen2-VL and Qwen2.5-VL: any image size, rotary positions in three dimensions."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl", "qwen2_vl")

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        self.patches = PatchPixels(processor.image_processor)
        self._plans = lru_cache(maxsize=16)(self._make_plan)
        patch_embed = bare(self.tower.patch_embed)
        # Bound to the module, so that a copy of it has its own.
        patch_embed.forward = MethodType(_embed_patches, patch_embed)
        config = self.tower.config
        if config._attn_implementation == "sdpa":
            # transformers would loop over the images; this is one call for all of them.
            config._attn_implementation = register_segmented_sdpa()

    @property
    def tower(self) -> Any:
        return bare(self.base.model.visual)

    def positions(self, inputs: Mapping[str, Tensor], extra: int) -> Tensor:
        tokens, kinds = inputs["input_ids"], inputs["mm_token_type_ids"]
        positions, _ = self.base.model.get_rope_index(
            torch.cat((tokens, tokens.new_zeros(1, extra)), 1),
            mm_token_type_ids=torch.cat((kinds, kinds.new_zeros(1, extra)), 1),
            image_grid_thw=inputs["image_grid_thw"],
        )
        return positions

    def pixels(self, images: Tensor) -> Tensor:
        return self.patches(images.to(self.device))

    def image_features(self, pixels: Tensor, batch: int, size: tuple[int, int]) -> ImageFeatures:
        grid, plan = self.plan(batch, size)
        out = self.tower(pixels.to(self.dtype), grid_thw=grid, **plan)
        tokens, *deep = (
            x.reshape(batch, -1, x.shape[-1])
            for x in (out.pooler_output, *(getattr(out, "deepstack_features", None) or ()))
        )
        return ImageFeatures(tokens, tuple(deep))

    def plan(self, batch: int, size: tuple[int, int]) -> tuple[Tensor, dict[str, Any]]:
        """The tower's index tensors: they depend only on batch and size, and are made on the host, once."""
        with own_mode(self.device):
            return self._plans(batch, size)

    def _make_plan(self, batch: int, size: tuple[int, int]) -> tuple[Tensor, dict[str, Any]]:
        from transformers.vision_utils import (
            get_vision_cu_seqlens,
            get_vision_position_ids,
            get_vision_window_index,
        )

        config = self.tower.config
        grid = torch.tensor([[1, *self.patches.grid(*size)]] * batch)
        lengths = get_vision_cu_seqlens(grid)
        plan: dict[str, Any] = {
            "cu_seqlens": lengths,
            "position_ids": get_vision_position_ids(grid, config.spatial_merge_size),
            "max_seqlen": int(lengths.diff().max()),
        }
        if hasattr(config, "window_size"):
            window = (config.spatial_merge_size, config.window_size, config.patch_size)
            plan["window_index"], plan["cu_window_seqlens"] = get_vision_window_index(grid, *window)
            plan["max_window_seqlen"] = int(plan["cu_window_seqlens"].diff().max())
        return grid, {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in plan.items()}


def _embed_patches(patch_embed: Any, patches: Tensor) -> Tensor:
    """A patch embedding, whose convolution has a stride of its kernel's size, as the product it is."""
    projection = bare(patch_embed.proj)
    if type(projection) is not nn.Conv3d or not untouched(projection):
        return type(patch_embed).forward(patch_embed, patches)
    weight = projection.weight
    return F.linear(patches.to(weight.dtype), weight.flatten(1), projection.bias)


class Qwen3VL(QwenVL):
    """Qwen3-VL: learned positions in the vision tower, and image features that enter early decoder layers."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl",)

    def _make_plan(self, batch: int, size: tuple[int, int]) -> tuple[Tensor, dict[str, Any]]:
        from transformers.vision_utils import get_vision_interpolation_indices_and_weights

        tower = self.tower
        grid, plan = super()._make_plan(batch, size)
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=tower.config.spatial_merge_size,
        )
        return grid, plan | {
            "interp_indices": indices.to(self.device),
            "interp_weights": weights.to(self.device),
        }

    def _image_arguments(
        self, embeddings: Tensor, rows: Padded, image_at: Tensor | None, image: ImageFeatures | None
    ) -> dict[str, Any]:
        if image_at is None or image is None:
            return {}
        where = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        where[:, image_at] = True
        deep = [x.to(embeddings.dtype).flatten(0, 1) for x in image.deep]
        return {"visual_pos_masks": rows.packed(where), "deepstack_visual_embeds": deep}


class SmolVLM(Backbone):
    """SmolVLM2. A frame is shown as one image: cutting small frames into tiles would only add tokens."""

    model_types: ClassVar[tuple[str, ...]] = ("smolvlm",)

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        processor.image_processor.do_image_splitting = False

    def process(self, text: str, images: list[Any]) -> Mapping[str, Tensor]:
        return super().process(text, [[image] for image in images])

    def pixels(self, images: Tensor) -> Tensor:
        arrays = [[image] for image in images.permute(0, 2, 3, 1).cpu().numpy()]
        out = self.processor.image_processor(images=arrays, return_tensors="pt")
        return out["pixel_values"].to(self.device)


BACKBONES: tuple[type[Backbone], ...] = (QwenVL, Qwen3VL, SmolVLM, Backbone)


def backbone_class(model_type: str) -> type[Backbone]:
    """The adapter for a transformers `model_type`.

    Raises:
        ValueError: no adapter knows this architecture; the message lists those that exist.
    """
    for cls in BACKBONES:
        if model_type in cls.model_types:
            return cls
    known = ", ".join(sorted(name for cls in BACKBONES for name in cls.model_types))
    raise ValueError(f"a checkpoint of architecture {model_type!r} is not supported; supported are {known}")
