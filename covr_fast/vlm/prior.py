"""The action prior: a VLM that looks at frames and answers with actions (Xia et al. 2026, Sec. 3)."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cuda_graph import CudaGraphs
from ..streams import Lane, receive
from .answer.grammar import ActionGrammar
from .answer.prompt import answer_format, default_prompt
from .decode.decoder import Decoder, Layout, make_layout
from .decode.graph import GraphedDecoder
from .decode.tower import ServingTower, make_tower
from .memory import out_of_memory
from .mode import own_mode
from .model.adapters import check_adapter_directory
from .model.backbones import Backbone, ImageFeatures
from .model.folder import model_folder, replaced_model, same_folder
from .model.loading import Settings, load_backbone
from .model.quantized import quantization_settings


class PriorBatch:
    """The VLM's answers to a batch of frames.

    Attributes:
        action: float32[B, A], each number in [-1, 1].
        token_ids: int64[B, L], the answers, end-of-turn token included, padded at the right.
        version: of the weights that answered; counts the prior's `publish`ed rounds.
    """

    def __init__(self, action: Tensor, token_ids: Tensor, version: int, grammar: ActionGrammar) -> None:
        self.action = action
        self.token_ids = token_ids
        self.version = version
        self._grammar = grammar

    @cached_property
    def text(self) -> list[str]:
        """The answers as text, such as "Action: [0.43, -0.37]". Made when asked for: it reads the device."""
        return [self._grammar.decode(row) for row in self.token_ids.tolist()]

    def __len__(self) -> int:
        return len(self.action)


class ActionPrior:
    """Frames in, actions out, through a VLM's text.

    `prior(images)` decodes fast (see `decode.Decoder`); `prior.reference(images)` gets the same answers from
    transformers' `generate`. Calls and `publish` exclude each other, so a tuner may run in another thread.
    On a GPU both are queued on a stream of the prior's own (see `streams`), whichever thread they come from.
    Answers do not depend on the modes of torch that the caller has set (autograd, inference, autocast).
    """

    def __init__(self, backbone: Backbone, settings: Settings, *, graph: bool = False) -> None:
        self.backbone = backbone
        self.settings = settings
        self.action_dim = settings.action_dim
        self.prompt = settings.prompt or default_prompt(settings.action_dim, settings.decimals)
        self.text = backbone.render(self.prompt)
        self.grammar = ActionGrammar(
            backbone.tokenizer,
            backbone.answer_context(self.text),
            action_dim=settings.action_dim,
            decimals=settings.decimals,
        )
        self.version = 0
        self.base_tuned = False
        """Whether weights below an adapter differ from those in `backbone.source`."""
        self._layouts: dict[tuple[int, int], Layout] = {}
        # One for all decoders that come and go: torch has 32 streams and hands out the first again after
        # that, and nobody else may be on the one that a graph is recorded on.
        self._graphs = CudaGraphs(backbone.device) if graph and backbone.device.type == "cuda" else None
        self._decoders: dict[tuple[int, int], Decoder | GraphedDecoder] = {}
        self._towers: dict[tuple[int, int], ServingTower | None] = {}
        self.lock = threading.RLock()
        self.lane = Lane(backbone.device)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        action_dim: int,
        prompt: str | None = None,
        decimals: int | None = None,
        attention: str = "auto",
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        seed: int = 0,
        quantization: Any = None,
        graph: bool = False,
    ) -> "ActionPrior":
        """Opens a VLM as an action prior.

        Args:
            model: "nano" (tiny, random, see `covr_fast.vlm.model.nano`), a checkpoint directory, what
                `save_pretrained` wrote, a directory with a peft adapter, or a hub id.
            action_dim: numbers in an action.
            prompt: the task in words. None: what a saved prior was saved with, else a generic prompt.
            decimals: digits after the point in answers, 1 to 4. None: as a saved prior was saved, else 2.
            attention: "auto", "flash_attention_4" / "_3" / "_2", "sdpa" or "eager".
            dtype: of the weights; None: as a saved prior was saved, else bfloat16 on CUDA, float32 elsewhere.
            device: None is CUDA where there is one, else the CPU.
            seed: of nano's random weights; no other model reads it.
            quantization: "8bit" or "4bit" hold the linear layers in fewer bits (bitsandbytes), for serving
                and as the frozen base of LoRA; "none" does not; a `transformers.BitsAndBytesConfig` says
                more. None: as a saved adapter had its base, else as the checkpoint comes.
            graph: on CUDA, replay the decode as CUDA graphs (`graphed.GraphedDecoder`) instead of launching
                it kernel by kernel. Not for quantized models.

        Raises:
            FileNotFoundError: no such model directory, or none of an adapter's base.
            TypeError: `action_dim` or `decimals` is no integer, or `prompt` no text.
            ValueError: one of those is out of range, the prompt holds one of the tokens that conversations
                are made of, unsupported architecture, no image token, a tokenizer that cannot spell the
                answers, an attention that cannot run here, an adapter that does not fit its base or is of
                a type that is not supported, another kind of quantization than bitsandbytes', or that
                without bitsandbytes.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if not isinstance(prompt, str | None):
            raise TypeError(f"prompt must be text, not {prompt!r}")
        model = model_folder(model)
        saved = Settings.load(Path(model)) if str(model) != "nano" else None
        asked = None if quantization is None else quantization_settings(quantization)
        if saved is not None:
            seed = saved.seed
            prompt = saved.prompt if prompt is None else prompt
            decimals = saved.decimals if decimals is None else decimals
            dtype = getattr(torch, saved.dtype) if dtype is None and saved.dtype else dtype
            asked = saved.quantization if asked is None else asked
        action_dim, decimals = answer_format(action_dim, 2 if decimals is None else decimals)
        check_adapter_directory(Path(model))
        with own_mode(device, grad=True):
            backbone = load_backbone(
                model, seed=seed, attention=attention, dtype=dtype, device=device, quantization=asked
            )
            if graph and backbone.quantized:
                raise ValueError("graph=True cannot record quantized layers: leave out graph or quantization")
            settings = Settings(
                base=backbone.source,
                seed=seed,
                action_dim=action_dim,
                decimals=decimals,
                prompt=prompt,
                dtype=str(backbone.dtype).removeprefix("torch."),
                quantization=asked,
            )
            return cls(backbone, settings, graph=graph)

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def __call__(
        self, images: Tensor, *, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> PriorBatch:
        """Answers for a batch of frames of one size.

        Args:
            images: uint8[B, 3, H, W], RGB, on any device.
            temperature: 0 decodes greedily, above it tokens are sampled.
            generator: randomness of sampling, on the CPU; None uses torch's default generator.

        Raises:
            TypeError, ValueError: images of another dtype or layout, or a negative temperature.
            MemoryError: the GPU's memory is full.
        """
        self.check_images(images)
        noise = self._noise(len(images), temperature, generator)
        remedy = "ask about fewer at a time, or load a smaller or a quantized model"
        with self.lock, self._serving(), out_of_memory(f"answering for {len(images)} frames", remedy):
            with self.lane.work(images, noise):
                size = (images.shape[2], images.shape[3])
                features = self._image_features(images, size)
                if size not in self._decoders:
                    self._decoders[size] = self._decoder(size)
                action, tokens = self._decoders[size](features, temperature, noise)
            receive(action, tokens)
            return PriorBatch(action, tokens, self.version, self.grammar)

    def reference(
        self, images: Tensor, *, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> PriorBatch:
        """The same through the processor and `generate`, with the grammar as a logits processor.

        This is the truth that `__call__` must equal token for token: same arguments, same answers.
        """
        from .decode.reference import generate_answers

        self.check_images(images)
        noise = self._noise(len(images), temperature, generator)
        with self.lock, self._serving():
            with self.lane.work(images, noise):
                tokens = generate_answers(self.backbone, self.text, self.grammar, images, temperature, noise)
                action = self.grammar.actions(tokens)
            receive(action, tokens)
            return PriorBatch(action, tokens, self.version, self.grammar)

    def layout(self, size: tuple[int, int]) -> Layout:
        """How the prompt is laid out for frames of `size` (height, width)."""
        # A tuner's thread asks, too, and tokenizers refuse two threads at a time.
        with self.lock, own_mode(self.device):
            if size not in self._layouts:
                self._layouts[size] = make_layout(self.backbone, self.text, size, self.grammar.max_length)
            return self._layouts[size]

    @contextmanager
    def _serving(self) -> Iterator[None]:
        """The mode that answers are made in: torch's, and that of the model, whose dropout is off."""
        with own_mode(self.device):
            if self.backbone.model.training:
                self.backbone.model.eval()
            yield

    def _image_features(self, images: Tensor, size: tuple[int, int]) -> ImageFeatures:
        if size not in self._towers:
            self._towers[size] = make_tower(self.backbone, size)
        tower = self._towers[size]
        if tower is None:
            return self.backbone.image_features(self.backbone.pixels(images), len(images), size)
        return tower(images)

    def _decoder(self, size: tuple[int, int]) -> Decoder | GraphedDecoder:
        decoder = Decoder(self.backbone, self.layout(size), self.grammar)
        return decoder if self._graphs is None else GraphedDecoder(decoder, self._graphs)

    def weights_changed(self) -> int:
        """Drops what was made of the old weights (copies, prefix cache, graphs); returns the new version.

        To be called whenever the model's weights, or which of its adapters are active, were changed by hand.
        """
        with self.lock:
            self._decoders.clear()
            self._towers.clear()
            self.version += 1
            return self.version

    def merge_adapter(self) -> None:
        """Folds an adapter into the weights, for good, so that all of them can be trained and saved."""
        with self.lock, torch.no_grad(), self.lane.work():
            if self.backbone.adapted:
                self.backbone = self.backbone.merged()
                self.base_tuned = True
                self._decoders.clear()
                self._towers.clear()

    def needs(self, directory: str | Path) -> bool:
        """Whether what `save_pretrained` writes refers to files in `directory`: those of its base."""
        source = Path(self.backbone.source)
        if not self.backbone.adapted or not source.is_absolute():
            return False
        return any(same_folder(folder, Path(directory)) for folder in (source, *source.parents))

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes what `from_pretrained(directory)` opens again.

        A fine-tuned adapter is written in peft's own format (the base is only named: hub ids as they are,
        directories by their absolute path), full weights as a transformers checkpoint; the processor beside
        them. A model that `directory` held is replaced, by the whole new one or not at all; other files in it
        stay.

        Raises:
            ValueError: `directory` holds the base of the adapter.
            FileExistsError: `directory` is a file, or holds a file that is no model's under a model's name.
            OSError: the system cannot replace or write `directory`.
        """
        directory = Path(directory)
        if self.backbone.adapted and same_folder(Path(self.backbone.source), Path(model_folder(directory))):
            raise ValueError(
                f"{directory} holds the base of this adapter, which must stay: save into another directory"
            )
        with self.lock, replaced_model(directory) as new:
            self.backbone.save(new)
            # Full weights say themselves how they are quantized.
            quantization = self.settings.quantization if self.backbone.adapted else None
            replace(self.settings, quantization=quantization).save(new)

    @staticmethod
    def check_images(images: Tensor, name: str = "images") -> None:
        """Raises TypeError or ValueError unless `images` is uint8[B, 3, H, W] with B > 0."""
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"{name} must be a uint8 tensor [B, 3, H, W], not {got}")
        if images.ndim != 4 or images.shape[1] != 3:
            hint = "; move the channels first" if images.ndim == 4 and images.shape[3] == 3 else ""
            raise ValueError(f"{name} must have shape [B, 3, H, W], not {tuple(images.shape)}{hint}")
        if len(images) == 0:
            raise ValueError(f"{name} must hold at least one frame")

    def _noise(self, batch: int, temperature: float, generator: torch.Generator | None) -> Tensor | None:
        """Gumbel noise for every choice of every row, or None for greedy decoding."""
        if temperature < 0:
            raise ValueError(f"temperature must not be negative, got {temperature}")
        if temperature == 0:
            return None
        levels = self.grammar.levels
        widest = max(len(level.tokens) for level in levels)
        with own_mode(self.device):
            uniform = torch.rand(batch, len(levels), widest, generator=generator, dtype=torch.float32)
            # Kept away from 0 and 1, where the logarithms are infinite.
            return (-(-uniform.clamp(1e-10, 1 - 1e-7).log()).log()).to(self.device)
