"""One interface for the VLM architectures.

A `Backbone` is a loaded model with its processor. The decoder and the tuner need four things of it: text
tokens to embeddings, frames to image features, embeddings and a KV cache to hidden states, and a head. The
base class uses what all VLMs of transformers have; the subclass of a family changes what differs there.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ...streams import send
from ..answer.prompt import CLOSING, OPENING
from .adapters import bare, check_adapters, check_savable, merge_for_good, untouched
from .attention import SEGMENTED_SDPA
from .folder import CARD_FILE
from .patches import PatchPixels
from .pixels import FramePixels
from .resample import BICUBIC, resize
from .rows import Padded

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFeatures:
    """The output of the vision tower, for the language model."""

    tokens: Tensor
    """[B, n, D]: the embeddings of each frame's n image tokens."""
    deep: tuple[Tensor, ...] = ()
    """[B, n, D] each: features added to the hidden states after the first decoder layers (Qwen3-VL)."""

    @property
    def requires_grad(self) -> bool:
        return any(x.requires_grad for x in (self.tokens, *self.deep))

    def rows(self, index: Tensor | slice) -> "ImageFeatures":
        """Those of some of the frames."""
        return ImageFeatures(self.tokens[index], tuple(x[index] for x in self.deep))


class Backbone:
    """A VLM whose position ids count up by one, such as LLaVA-1.5.

    `model` is transformers' `...ForConditionalGeneration`, or a peft model around one.
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
        self.adapter_has_embeddings = False
        """Whether the adapter was saved together with embeddings, which replace those of the base."""
        self.attention_reason = ""
        """Why the model was loaded with its attention implementation."""
        token = getattr(self.base.config, "image_token_id", None)
        if token is None or getattr(processor, "image_token", None) is None:
            raise ValueError(f"{type(processor).__name__} has no image token, so no frame can be shown to it")
        self.image_token_id = int(token)
        self._image_size = 0
        self._pixels = self._make_pixels()

    @property
    def model(self) -> Any:
        return self._model

    @model.setter
    def model(self, model: Any) -> None:
        check_adapters(model)
        self._model = model.eval()  # peft's layers start in training mode

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
        """Where the weights without an adapter come from: "nano", an absolute directory or a hub id."""
        return str(self.base.config.name_or_path)

    @property
    def quantized(self) -> bool:
        """Whether weights are stored in 8 or 4 bits: then only adapters can be trained."""
        return getattr(self.base, "hf_quantizer", None) is not None

    def merged(self) -> "Backbone":
        """A backbone with the adapter merged into the weights. It takes over this one's model."""
        return self.with_model(merge_for_good(self.model))

    def with_model(self, model: Any) -> Self:
        """A backbone with another model of the same architecture, and all else as here."""
        other = type(self)(model, self.processor)
        other._image_size, other.attention_reason = self._image_size, self.attention_reason
        return other

    @property
    def decoder(self) -> Any:
        """The language model: embeddings in, hidden states out."""
        return bare(self.base.get_decoder())

    @property
    def head(self) -> Any:
        """The module that computes logits from hidden states."""
        return bare(self.base.get_output_embeddings())

    @property
    def plain_head(self) -> nn.Linear | None:
        """The head, if it is a product with a matrix and nothing else; else None."""
        head = self.head
        return head if type(head) is nn.Linear and head.bias is None and untouched(head) else None

    @property
    def attention(self) -> str:
        """The attention implementation of the language model, by its name in transformers' registry."""
        return str(self.decoder.config._attn_implementation)

    @attention.setter
    def attention(self, name: str) -> None:
        self.decoder.config._attn_implementation = name

    @property
    def device(self) -> torch.device:
        return torch.device(self.decoder.device)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.decoder.dtype
        return dtype

    def checkpoint_activations(self) -> None:
        """Layers recompute their activations. They alone are in training mode, so dropout stays off."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        self.base.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers made the inputs of both towers require gradients, which only reentrant
        # checkpoints need. A frozen vision tower would be differentiated, and its features not be kept.
        self.base.disable_input_require_grads()
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True

    def embed(self, tokens: Tensor) -> Tensor:
        """int64[...] -> [..., D]."""
        embeddings: Tensor = self.base.get_input_embeddings()(tokens)
        return embeddings

    def save(self, directory: Path) -> None:
        """Writes weights (or the adapter) and the processor into an empty directory."""
        if self.adapted:
            check_savable(self.model)
            # peft's default setting would look for the base on the hub.
            self.model.save_pretrained(directory, save_embedding_layers=self.adapter_has_embeddings)
            (directory / CARD_FILE).unlink(missing_ok=True)  # peft's empty form of a model card
        else:
            # transformers cannot convert weights back that were quantized in the checkpoint.
            self.model.save_pretrained(directory, save_original_format=not self.quantized)
        self.processor.save_pretrained(directory)
        # The processor's file has these settings too, but other tools look for them in a file of their own.
        self.processor.image_processor.save_pretrained(directory)

    # ---- the prompt ----

    def render(self, prompt: str) -> str:
        """The conversation up to the answer. The task comes before the image, so that all frames share it."""
        special = self._special_tokens()
        tokens = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if found := [token for token in tokens if token in special]:
            token = str(self.tokenizer.convert_ids_to_tokens(found[0]))
            raise ValueError(
                f"the prompt holds {token!r}, which marks images or turns in this model's conversations; it "
                "is put there for you: describe the task in words only"
            )
        text = self._conversation(prompt)
        if self.processor.image_token not in text:
            raise ValueError(
                f"the chat template of {type(self.processor).__name__} puts no image token into {text!r}"
            )
        return text

    def answer_frame(self, prompt: str) -> tuple[str, int | None]:
        """The text between `render(prompt)` and an answer, and the special token after the answer.

        Both are as in the conversations that the model was trained with, which the chat template writes:
        LLaVA has a space after "ASSISTANT:". A template that writes no answer gives no text and no token.
        """
        before, answer = self.render(prompt), OPENING + CLOSING
        for content in ([{"type": "text", "text": answer}], answer):  # templates take the one or the other
            try:
                text = self._conversation(prompt, {"role": "assistant", "content": content})
            except (TemplateError, TypeError, ValueError):
                continue
            if text.startswith(before) and answer in text[len(before) :]:
                leading, _, after = text[len(before) :].partition(answer)
                tokens = self.tokenizer(after, add_special_tokens=False)["input_ids"]
                special = self._special_tokens()
                return leading, next((token for token in tokens if token in special), None)
        return "", None

    def _conversation(self, prompt: str, *answer: dict[str, Any]) -> str:
        """The template's text of a turn of the user, and of the answer's turn or its beginning."""
        content = [{"type": "text", "text": prompt}, {"type": "image"}]
        # By the tokenizer: some processors would read settings of their video half, which is not loaded.
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}, *answer],
            chat_template=getattr(self.processor, "chat_template", None),
            tokenize=False,
            add_generation_prompt=not answer,
        )
        return text

    def _special_tokens(self) -> set[int | None]:
        """The tokens that mark images, turns and the like."""
        tokenizer, config = self.tokenizer, self.base.config
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        kinds = ("image", "video", "vision_start", "vision_end")
        of_images = {getattr(config, f"{kind}_token_id", None) for kind in kinds}
        # The unknown token stands for any character that the tokenizer does not know.
        return (added | of_images | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}

    def answer_context(self, text: str) -> str:
        """The part of the rendered prompt after the image. The tokens of an answer may depend on it."""
        return text.rpartition(str(self.processor.image_token))[2]

    def process(self, text: str, images: Tensor) -> dict[str, Tensor]:
        """The processor's inputs for `model.generate`: one of uint8[B, 3, H, W] and the same text per row."""
        nested = _nested(self.seen(images))
        return dict(self.processor(text=[text] * len(images), images=nested, return_tensors="pt"))

    def positions(self, inputs: dict[str, Tensor], extra: int) -> Tensor:
        """Position ids [..., 1, S + extra] of one processed row followed by `extra` text tokens."""
        return torch.arange(inputs["input_ids"].shape[1] + extra)[None]

    # ---- the image ----

    @property
    def image_size(self) -> int:
        """The longer side of the frames that the model sees, in pixels; 0 shows them as they are.

        Setting it raises a ValueError for a size that is smaller than one image token.
        """
        return self._image_size

    @image_size.setter
    def image_size(self, size: int) -> None:
        least = self.token_side
        if size != 0 and size < least:
            raise ValueError(
                f"image_size={size} is too small for {self.base.config.model_type}: use at least {least}, or "
                "0 to show frames as they are"
            )
        self._image_size = size

    @property
    def token_side(self) -> int:
        """Least pixels along a side of the frame that an image token, or a patch of the tower, covers."""
        return int(self.base.config.vision_config.patch_size)

    def seen(self, images: Tensor) -> Tensor:
        """uint8[B, 3, H, W] -> the same frames with a longer side of `image_size` and their aspect, resized
        as by Pillow's bicubic filter on their device."""
        height, width = images.shape[2:]
        if self.image_size == 0:
            return images
        scale = self.image_size / max(height, width)
        size = max(1, round(height * scale)), max(1, round(width * scale))
        return resize(images, [size], BICUBIC)

    def on_device(self, images: Tensor) -> Tensor:
        """uint8 frames on the model's device. From host memory they go there without a wait of the host."""
        return send(images, self.device) if images.is_cpu else images.to(self.device)

    def pixels(self, images: Tensor) -> Tensor:
        """Frames uint8[B, 3, H, W] on any device -> the vision tower's input on the model's, B of it."""
        return self._pixels(self.seen(self.on_device(images)))

    def _make_pixels(self) -> Callable[[Tensor], Tensor]:
        """What makes the tower's input of frames on the device, as the processor does."""
        try:
            return FramePixels(self.processor.image_processor)
        except ValueError as error:
            log.warning("frames go through the processor, one by one on the CPU: %s", error)
            return self._processed

    def _processed(self, images: Tensor) -> Tensor:
        pixels: Tensor = self.processor.image_processor(images=_nested(images), return_tensors="pt")[
            "pixel_values"
        ]
        return send(pixels.flatten(0, -4), self.device)

    def image_features(self, images: Tensor) -> ImageFeatures:
        """Features of frames uint8[B, 3, H, W]."""
        features = self._embed_frames(self.pixels(images).to(self.dtype))
        return ImageFeatures(features.reshape(len(images), -1, features.shape[-1]))

    def _embed_frames(self, pixels: Tensor) -> Tensor:
        """The image tokens' embeddings, those of a frame beside each other."""
        features = self.base.get_image_features(pixel_values=pixels).pooler_output
        return features if isinstance(features, Tensor) else torch.cat(tuple(features))

    # ---- the language model ----

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
        """Last hidden states [B, n, D] of padded `embeddings` [B, n, D] that follow the tokens in `cache`.

        Args:
            positions: [..., 1, n], the same in every row.
            rows: how the decoder takes the rows: from `rows.arrange`, with the prefix length of the cache.
            cache: a KV cache; None for rows without a prefix.
            image_at: int64[m], which of the n places are image tokens; with `image`.
        """
        deep: dict[str, Any] = {}
        if image_at is not None and image is not None:
            embeddings = embeddings.index_copy(1, image_at, image.tokens.to(embeddings.dtype))
            deep = self._deep_arguments(embeddings, rows, image_at, image.deep)
        hidden = self.decoder(
            inputs_embeds=rows.packed(embeddings),
            position_ids=rows.positions(positions),
            past_key_values=cache,
            use_cache=cache is not None,
            **rows.attention(embeddings),
            **deep,
        ).last_hidden_state
        return rows.padded(hidden)

    def _deep_arguments(
        self, embeddings: Tensor, rows: Padded, image_at: Tensor, features: tuple[Tensor, ...]
    ) -> dict[str, Any]:
        """The decoder's arguments for `ImageFeatures.deep`."""
        return {}


def _nested(images: Tensor) -> list[list[Any]]:
    """uint8[B, 3, H, W] as processors take images: a list of arrays [H, W, 3] per text."""
    return [[image] for image in images.permute(0, 2, 3, 1).cpu().numpy()]


class QwenVL(Backbone):
    """Qwen2-VL and Qwen2.5-VL: any image size, rotary positions in three dimensions."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl", "qwen2_vl")

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        self._plan = lru_cache(maxsize=16)(self._make_plan)
        patch_embed = bare(self.tower.patch_embed)
        # A method of this module, because a deep copy of the module then gets its own.
        patch_embed.forward = MethodType(_embed_patches, patch_embed)
        config = self.tower.config
        if config._attn_implementation == "sdpa":
            # transformers' SDPA would loop over the images; this is one call for all of them.
            config._attn_implementation = SEGMENTED_SDPA

    @property
    def tower(self) -> Any:
        return bare(self.base.model.visual)

    def positions(self, inputs: dict[str, Tensor], extra: int) -> Tensor:
        tokens, kinds = inputs["input_ids"], inputs["mm_token_type_ids"]
        positions: Tensor = self.base.model.get_rope_index(
            torch.cat((tokens, tokens.new_zeros(1, extra)), 1),
            mm_token_type_ids=torch.cat((kinds, kinds.new_zeros(1, extra)), 1),
            image_grid_thw=inputs["image_grid_thw"],
        )[0]
        return positions

    @property
    def token_side(self) -> int:
        return int(self.patches.patch * self.patches.merge)

    def _make_pixels(self) -> Callable[[Tensor], Tensor]:
        self.patches = PatchPixels(self.processor.image_processor)
        return self.patches

    def image_features(self, images: Tensor) -> ImageFeatures:
        batch = len(images)
        images = self.seen(self.on_device(images))
        pixels = self.patches(images).to(self.dtype)
        grid, plan = self.plan(batch, (images.shape[2], images.shape[3]))
        out = self.tower(pixels, grid_thw=grid, **plan)
        features = (out.pooler_output, *(getattr(out, "deepstack_features", None) or ()))
        tokens, *deep = (x.reshape(batch, -1, x.shape[-1]) for x in features)
        return ImageFeatures(tokens, tuple(deep))

    def plan(self, batch: int, size: tuple[int, int]) -> tuple[Tensor, dict[str, Any]]:
        """The tower's index tensors for `batch` frames of `size`, as the tower sees them.

        They are the beginning of those for the next power of two, because each frame adds as much to them as
        the others: so batches of 1 to 64 rows need 7 plans.
        """
        rows = 1 << (batch - 1).bit_length()
        grid, plan = self._plan(rows, size)

        def beginning(name: str, x: Tensor) -> Tensor:
            bounds = int(name.endswith("seqlens"))  # one more than there are segments
            return x[: (len(x) - bounds) // rows * batch + bounds]

        parts = {k: beginning(k, v) if isinstance(v, Tensor) else v for k, v in plan.items()}
        return grid[:batch], parts

    def _make_plan(self, batch: int, size: tuple[int, int]) -> tuple[Tensor, dict[str, Any]]:
        """The same for any `batch`, computed by the host and copied to the device."""
        from transformers import vision_utils as vision

        config = self.tower.config
        grid = torch.tensor([[1, *self.patches.grid(*size)]] * batch)
        lengths = vision.get_vision_cu_seqlens(grid)
        plan: dict[str, Any] = {
            "cu_seqlens": lengths,
            "position_ids": vision.get_vision_position_ids(grid, config.spatial_merge_size),
            "max_seqlen": int(lengths.diff().max()),
        }
        if hasattr(config, "window_size"):
            window = (config.spatial_merge_size, config.window_size, config.patch_size)
            plan["window_index"], plan["cu_window_seqlens"] = vision.get_vision_window_index(grid, *window)
            plan["max_window_seqlen"] = int(plan["cu_window_seqlens"].diff().max())
        return grid, {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in plan.items()}


def _embed_patches(patch_embed: Any, patches: Tensor) -> Tensor:
    """A patch embedding as one product, which equals its convolution: the stride is the kernel's size."""
    projection = bare(patch_embed.proj)
    if type(projection) is not nn.Conv3d or not untouched(projection):
        embedded: Tensor = type(patch_embed).forward(patch_embed, patches)
        return embedded
    weight = projection.weight
    return F.linear(patches.to(weight.dtype), weight.flatten(1), projection.bias)


class Qwen3VL(QwenVL):
    """Qwen3-VL: learned positions in the vision tower, and image features that early decoder layers add."""

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
        indices, weights = indices.to(self.device), weights.to(self.device)
        return grid, plan | {"interp_indices": indices, "interp_weights": weights}

    def _deep_arguments(
        self, embeddings: Tensor, rows: Padded, image_at: Tensor, features: tuple[Tensor, ...]
    ) -> dict[str, Any]:
        where = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        where[:, image_at] = True
        deep = [x.to(embeddings.dtype).flatten(0, 1) for x in features]
        return {"visual_pos_masks": rows.packed(where), "deepstack_visual_embeds": deep}


class SmolVLM(Backbone):
    """SmolVLM2. A frame is one image: tiles of small frames would only add tokens."""

    model_types: ClassVar[tuple[str, ...]] = ("smolvlm",)

    def __init__(self, model: Any, processor: Any) -> None:
        processor.image_processor.do_image_splitting = False
        super().__init__(model, processor)

    def _embed_frames(self, pixels: Tensor) -> Tensor:
        # transformers' own function looks for frames that are padding, and the host waits for what it finds.
        # Here no frame is, and the patches of all are valid, so attention needs no mask.
        model = self.base.model
        tower = bare(model.vision_model)
        height, width = (side // tower.patch_size for side in pixels.shape[2:])
        valid = torch.ones(len(pixels), height, width, dtype=torch.bool, device=pixels.device)
        x = tower.embeddings(pixel_values=pixels, patch_attention_mask=valid)
        x = tower.post_layernorm(tower.encoder(inputs_embeds=x).last_hidden_state)
        features: Tensor = model.connector(x)
        return features


BACKBONES: tuple[type[Backbone], ...] = (QwenVL, Qwen3VL, SmolVLM, Backbone)


def backbone_class(model_type: str) -> type[Backbone]:
    """The class for a transformers `model_type`. Raises ValueError with those that are supported."""
    for cls in BACKBONES:
        if model_type in cls.model_types:
            return cls
    known = ", ".join(sorted(name for cls in BACKBONES for name in cls.model_types))
    raise ValueError(f"a checkpoint of architecture {model_type!r} is not supported; supported are {known}")
