"""The action prior: a VLM that looks at frames and answers with actions (Xia et al. 2026, Sec. 3)."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cuda_graph import CudaGraphs
from ..scalars import as_int
from ..streams import Lane, receive, send
from .answer.grammar import ActionGrammar
from .answer.prompt import answer_format, default_prompt
from .decode.decoder import Decoder, DecoderWeights, Layout, make_layout
from .decode.graph import GraphedDecoder
from .decode.likelihood import ActionDistribution, answer_log_prob, number_log_prob
from .decode.numbers import batches
from .decode.reference import generate_answers, next_token_log_probs
from .memory import out_of_memory
from .mode import own_mode
from .model.backbones import Backbone
from .model.card import write_card
from .model.folder import NANO_BASE, model_folder, name_nano_base, replaced_model, same_folder
from .model.loading import Settings, find_model, load_backbone
from .model.nano import write_nano
from .model.processor import quiet
from .model.quantized import quantization_settings


@dataclass(eq=False)
class PriorBatch:
    """The VLM's answers to a batch of frames."""

    action: Tensor
    """float32[B, A], each number in [-1, 1]."""
    token_ids: Tensor
    """int64[B, L], the answers with their end-of-turn token, padded at the right."""
    version: int
    """Of the weights that answered. It goes up by 1 with every change of the prior's weights."""
    confidence: Tensor | None
    """float32[B] in [0, 1], if it was asked for: 1 - H / (A log G). H is the sum of the entropies of the
    answer's A numbers, each given the earlier numbers of this answer, be it greedy or sampled. log G is the
    largest entropy of a number with G values. The entropies are those at temperature 1, whatever was sampled
    at."""
    _grammar: ActionGrammar

    @cached_property
    def text(self) -> list[str]:
        """The answers as text, for example "Action: [0.43, -0.37]". The first use reads from the device."""
        return [self._grammar.decode(row) for row in self.token_ids.tolist()]

    def __len__(self) -> int:
        return len(self.action)


class ActionPrior:
    """Frames in, actions out, through a VLM's text.

    `prior(images)` decodes fast (see `decode.decoder.Decoder`); `prior.reference(images)` gets the same
    answers from transformers' `generate`. A lock keeps calls and the tuner's `publish` apart, so they may
    come from different threads. On a GPU both are queued on the prior's stream (see `streams`). Answers do
    not depend on the modes of torch that the caller has set (autograd, inference, autocast).
    """

    def __init__(self, backbone: Backbone, settings: Settings, *, graph: bool = False) -> None:
        self.backbone = backbone
        self.settings = settings
        self.action_dim = settings.action_dim
        self.prompt = settings.prompt or default_prompt(settings.action_dim, settings.decimals)
        self.text = backbone.render(self.prompt)
        leading, end = backbone.answer_frame(self.prompt)
        self.grammar = ActionGrammar(
            backbone.tokenizer,
            backbone.answer_context(self.text),
            leading=leading,
            end=end,
            action_dim=settings.action_dim,
            decimals=settings.decimals,
        )
        self.version = 0
        self.base_tuned = False
        """Whether the weights without adapters differ from those in `backbone.source`."""
        self._layouts: dict[tuple[int, int], Layout] = {}
        self._decoders: dict[tuple[int, int], Decoder | GraphedDecoder] = {}
        self._weights: DecoderWeights | None = None
        """Of all decoders. None until a decoder needs them."""
        # One for all decoders: each has a stream, nothing else may use that while a graph is recorded, and
        # torch has 32 streams, which it gives out again from the first on.
        self._graphs = CudaGraphs(backbone.device) if graph and backbone.device.type == "cuda" else None
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
        image_size: int | None = None,
        attention: str = "auto",
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        seed: int = 0,
        quantization: Any = None,
        graph: bool | None = None,
    ) -> "ActionPrior":
        """Opens a VLM as an action prior.

        Args:
            model: "nano" (tiny, random, see `covr_fast.vlm.model.nano`), a checkpoint directory, what
                `save_pretrained` wrote, a directory with a peft adapter, or the hub id of one of these. Code
                in a checkpoint is never run.
            action_dim: numbers in an action.
            prompt: the task in words. None: the saved prior's, else a generic prompt.
            decimals: digits after the point in answers, 1 to 4. None: the saved prior's, else 2.
            image_size: the longer side in pixels of the frames as the VLM sees them; they are resized on its
                device and keep their aspect. 0 shows them as they are. None: the saved prior's, else 0.
            attention: "auto", "flash_attention_4" / "_3" / "_2", "sdpa" or "eager".
            dtype: of the weights. None: the saved prior's, else bfloat16 on CUDA, float32 elsewhere.
            device: None takes CUDA where there is one, else the CPU.
            seed: of nano's random weights; other models ignore it.
            quantization: "8bit" or "4bit" quantizes the linear layers (bitsandbytes), for serving and as the
                frozen base of LoRA; "none" does not; a `transformers.BitsAndBytesConfig` sets details. None:
                that of a saved adapter's base, else that of the checkpoint.
            graph: on CUDA, replay the decode as CUDA graphs (`decode.graph.GraphedDecoder`) instead of
                launching it kernel by kernel. None does so unless layers are quantized, which cannot be
                recorded.

        Raises:
            FileNotFoundError: the model or an adapter's base is neither a directory nor on the hub, or it was
                not downloaded and there is no connection.
            PermissionError: the model on the hub is gated, and its terms have not been accepted.
            OSError: a download failed.
            TypeError: `action_dim`, `decimals` or `image_size` is not an integer, or `prompt` is not text.
            ValueError: one of those is out of range; the saved prompt asks for another count of numbers than
                `action_dim`; `model` is the folder of a run; the prompt contains a token that marks images or
                turns of a conversation; the architecture, the adapter's type or the quantization is not
                supported; `image_size` is too small for the model; the model has no image token; its
                tokenizer cannot spell the answers; the attention cannot run here; the adapter does not fit
                its base; bitsandbytes is missing.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if not isinstance(prompt, str | None):
            raise TypeError(f"prompt must be text, not {prompt!r}")
        asked = None if quantization is None else quantization_settings(quantization)
        # Refused before a download.
        answer_format(action_dim, 2 if decimals is None else decimals)
        as_int(0 if image_size is None else image_size, "image_size")
        source = find_model(model)
        saved = Settings.load(source.folder) if source.folder is not None else None
        if saved is not None:
            if prompt is None and saved.prompt is not None and action_dim != saved.action_dim:
                raise ValueError(
                    f"action_dim={action_dim}: the saved prompt of {str(model)!r} asks for "
                    f"{saved.action_dim} numbers: give action_dim={saved.action_dim}, or another prompt"
                )
            seed = saved.seed
            prompt = saved.prompt if prompt is None else prompt
            decimals = saved.decimals if decimals is None else decimals
            image_size = saved.image_size if image_size is None else image_size
            dtype = getattr(torch, saved.dtype) if dtype is None and saved.dtype else dtype
            asked = saved.quantization if asked is None else asked
        action_dim, decimals = answer_format(action_dim, 2 if decimals is None else decimals)
        image_size = as_int(0 if image_size is None else image_size, "image_size")
        with own_mode(device, grad=True):
            backbone = load_backbone(
                source, seed=seed, attention=attention, dtype=dtype, device=device, quantization=asked
            )
            if graph and backbone.quantized:
                raise ValueError("graph=True cannot record quantized layers: leave out graph or quantization")
            backbone.image_size = image_size
            settings = Settings(
                base=saved.base if saved is not None and not backbone.adapted else backbone.source,
                seed=seed,
                action_dim=action_dim,
                decimals=decimals,
                prompt=prompt,
                dtype=str(backbone.dtype).removeprefix("torch."),
                quantization=asked,
                image_size=image_size,
            )
            return cls(backbone, settings, graph=not backbone.quantized if graph is None else graph)

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def image_size(self) -> int:
        """The longer side of the frames as the VLM sees them, in pixels; 0 shows them as they are. It may be
        set between calls: the next answer, and the next round of a tuner, are for the new size."""
        return self.backbone.image_size

    @image_size.setter
    def image_size(self, size: int) -> None:
        with self.lock:
            self.backbone.image_size = as_int(size, "image_size")
            self.settings = replace(self.settings, image_size=self.backbone.image_size)
            self._layouts.clear()
            self._decoders.clear()

    def __call__(
        self,
        images: Tensor,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        confidence: bool = False,
    ) -> PriorBatch:
        """Answers for a batch of frames of one size.

        Args:
            images: uint8[B, 3, H, W], RGB, on any device.
            temperature: 0 takes the most probable tokens; above 0 tokens are sampled.
            generator: randomness of sampling, on the CPU. None uses torch's default generator.
            confidence: also compute `PriorBatch.confidence`, which costs one more forward.

        Raises:
            TypeError, ValueError: images of another dtype or layout, or a negative temperature.
            MemoryError: the GPU's memory is full.
        """
        decode = partial(self._decode, confidence=confidence)
        return self._answer(decode, images, temperature, generator)

    def reference(
        self, images: Tensor, *, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> PriorBatch:
        """The same through the processor and `generate`, with the grammar as a logits processor.

        With the same arguments `__call__` must give the same answers, token for token.
        """
        return self._answer(self._generate, images, temperature, generator)

    def next_token(self, image: Tensor, answer: list[int]) -> dict[int, float]:
        """What the model says of the next token of an answer: log p (nats) of each token that the grammar
        allows there, normalized over them. By transformers' own forward pass, like `reference`.

        Args:
            image: uint8[1, 3, H, W].
            answer: the tokens of the answer so far.
        """
        self.check_images(image, "image")
        with self.lock, own_mode(self.device), self.lane.work(image):
            return next_token_log_probs(self.backbone, self.text, self.grammar, image, answer)

    def log_prob(self, images: Tensor, actions: Tensor) -> Tensor:
        """How likely the VLM is to answer these frames with these actions: float32[B] in nats, on its device.

        It is the log-probability of the one answer that spells an action, among all answers of the grammar
        (whose probabilities sum to 1): the sum over its choices of the log-softmax over the allowed tokens.
        This is what sampling at temperature 1 draws from.

        Args:
            images: uint8[B, 3, H, W], RGB, on any device.
            actions: float[B, A]; each number is clipped to [-1, 1] and rounded to the grid.

        Raises:
            TypeError, ValueError: images of another dtype or layout; actions of another shape, or not finite.
            MemoryError: the GPU's memory is full.
        """
        self.check_images(images)
        self._check_numbers(actions, "actions", (len(images), self.action_dim))
        with self._working(f"computing likelihoods of {len(images)} answers", images, actions):
            answers = self.grammar.encode(actions).to(self.device)
            log_prob = self._in_parts(answer_log_prob, images, answers)
        receive(log_prob)
        return log_prob

    def distribution(
        self, images: Tensor, dim: int = 0, *, given: Tensor | None = None
    ) -> ActionDistribution:
        """What the VLM thinks of number `dim` of its answers: the exact distribution over the grid.

        The probability of a value is that of its tokens, after the prompt and the earlier numbers. So the
        distributions of all numbers, each given the earlier ones, multiply to the probability of an answer.

        Args:
            images: uint8[B, 3, H, W], RGB, on any device.
            dim: which number, from 0.
            given: float[B, dim], the earlier numbers, clipped to [-1, 1] and rounded to the grid. None: those
                of the greedy answers.

        Raises:
            TypeError, ValueError: images of another dtype or layout; `dim` is no number of an action; `given`
                has another shape, or is not finite.
            MemoryError: the GPU's memory is full.
        """
        self.check_images(images)
        dim = as_int(dim, "dim")
        if not 0 <= dim < self.action_dim:
            raise ValueError(f"dim must be between 0 and {self.action_dim - 1}, not {dim}")
        if given is not None:
            self._check_numbers(given, "given", (len(images), dim))
        with self.lock:  # so that the greedy answers are of the same weights
            if given is None:
                # Nothing comes before the first number, and nothing has to be asked.
                given = self(images).action[:, :dim] if dim else torch.empty(len(images), 0, device="cpu")
            with self._working(f"computing distributions for {len(images)} frames", images, given):
                # Any number may follow in the text: all begin with the same tokens.
                answers = self.grammar.encode(F.pad(given, (0, 1))).to(self.device)
                places = self.grammar.places(given).to(self.device)
                log_prob = self._in_parts(partial(number_log_prob, slot=dim), images, answers, places)
                values = self.grammar.grid.to(self.device)
        receive(values, log_prob)
        return ActionDistribution(values, log_prob)

    def _in_parts(self, compute: Callable[..., Tensor], images: Tensor, *inputs: Tensor) -> Tensor:
        """`compute(decoder, image features, *inputs)` for as many rows at a time as fit into one forward."""
        found = self._decoder(_size(images))
        decoder = found.decoder if isinstance(found, GraphedDecoder) else found
        width = len(self.layout(_size(images)).body) + self.grammar.max_length
        parts = [
            compute(decoder, self.backbone.image_features(images[rows]), *(x[rows] for x in inputs))
            for rows in batches(len(images), width)
        ]
        return torch.cat(parts)

    def _answer(
        self,
        decode: Callable[[Tensor, float, Tensor | None], tuple[Tensor, ...]],
        images: Tensor,
        temperature: float,
        generator: torch.Generator | None,
    ) -> PriorBatch:
        """Runs `decode(images, temperature, noise) -> action, tokens[, confidence]` on the prior's stream."""
        self.check_images(images)
        noise = self._noise(len(images), temperature, generator)
        with self.lock:
            with self._working(f"answering for {len(images)} frames", images, noise):
                action, tokens, *confidence = decode(images, temperature, noise)
            receive(action, tokens, *confidence)
            return PriorBatch(action, tokens, self.version, next(iter(confidence), None), self.grammar)

    @contextmanager
    def _working(self, doing: str, *inputs: Tensor | None) -> Iterator[None]:
        """For a block of the model's work on `inputs`, on the prior's stream."""
        remedy = "ask about fewer at a time, or load a smaller or a quantized model"
        with self.lock, own_mode(self.device), out_of_memory(doing, remedy):
            if self.backbone.model.training:
                self.backbone.model.eval()  # without dropout
            with self.lane.work(*inputs):
                yield

    def _decode(
        self, images: Tensor, temperature: float, noise: Tensor | None, *, confidence: bool
    ) -> tuple[Tensor, ...]:
        features = self.backbone.image_features(images)
        return self._decoder(_size(images))(features, temperature, noise, confidence=confidence)

    def _decoder(self, size: tuple[int, int]) -> Decoder | GraphedDecoder:
        """Answers for frames of `size`."""
        if size not in self._decoders:
            if self._weights is None:
                self._weights = DecoderWeights(self.backbone, self.grammar)
            decoder = Decoder(self._weights, self.layout(size))
            self._decoders[size] = GraphedDecoder(decoder, self._graphs) if self._graphs else decoder
        return self._decoders[size]

    def _generate(self, images: Tensor, temperature: float, noise: Tensor | None) -> tuple[Tensor, ...]:
        tokens = generate_answers(self.backbone, self.text, self.grammar, images, temperature, noise)
        return self.grammar.actions(tokens), tokens

    def layout(self, size: tuple[int, int]) -> Layout:
        """How the prompt is laid out for frames of `size` (height, width)."""
        # The tuner's thread calls this too, and a tokenizer must not be used by two threads at a time.
        with self.lock, own_mode(self.device):
            if size not in self._layouts:
                self._layouts[size] = make_layout(self.backbone, self.text, size, self.grammar.max_length)
            return self._layouts[size]

    def weights_changed(self) -> int:
        """Drops what was made of the old weights (copies, prefix caches, graphs); returns the new version.

        Call it after you have changed the model's weights, or which of its adapters are active.
        """
        with self.lock:
            self._drop_decoders()
            self.version += 1
            return self.version

    def merge_adapter(self) -> None:
        """Merges an adapter into the weights for good, so that all weights can be trained and saved."""
        with self.lock, torch.no_grad(), self.lane.work():
            if self.backbone.adapted:
                self.backbone = self.backbone.merged()
                self.base_tuned = True
                self._drop_decoders()

    def _drop_decoders(self) -> None:
        self._decoders.clear()
        self._weights = None

    def needs(self, directory: str | Path) -> bool:
        """Whether a saved copy of this prior would need files in `directory`: its adapter's base is there."""
        source = Path(self.backbone.source)
        if not self.backbone.adapted or not source.is_absolute():
            return False
        return any(same_folder(folder, Path(directory)) for folder in (source, *source.parents))

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes a model that `from_pretrained(directory)` opens again.

        An adapter is written in peft's format, and refers to its base by hub id or absolute path; the base of
        an adapter of nano is written next to it. Full weights are written as a transformers checkpoint. The
        processor and a model card (README.md) are written next to them. A model that was in `directory` is
        replaced, as a whole or not at all; other files in it stay, also a README.md of yours.

        Raises:
            ValueError: `directory` contains the base of the adapter.
            FileExistsError: `directory` is a file, or a file in it has a name of a model's file but is not
                one.
            OSError: the system cannot replace or write `directory`.
        """
        directory = Path(directory)
        replaced = Path(model_folder(directory))
        base = Path(self.backbone.source)
        if self.backbone.adapted and any(same_folder(base, own) for own in (replaced, replaced / NANO_BASE)):
            raise ValueError(
                f"{directory} holds the base of this adapter, which must stay: save into another directory"
            )
        with self.lock, replaced_model(directory) as new, quiet():
            self.backbone.save(new)
            # A checkpoint with full weights says how they are quantized.
            quantization = self.settings.quantization if self.backbone.adapted else None
            named = self.backbone.source if self.backbone.adapted else self.settings.base
            replace(self.settings, quantization=quantization, base=named).save(new)
            if self.backbone.adapted and self.backbone.source == "nano":
                (new / NANO_BASE).mkdir()
                write_nano(new / NANO_BASE, seed=self.settings.seed)
                name_nano_base(new, directory)
            write_card(new)

    @staticmethod
    def _check_numbers(numbers: Tensor, name: str, shape: tuple[int, int]) -> None:
        if not isinstance(numbers, Tensor) or not numbers.is_floating_point():
            got = numbers.dtype if isinstance(numbers, Tensor) else type(numbers).__name__
            raise TypeError(f"{name} must be a float tensor {list(shape)}, not {got}")
        if numbers.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, not {list(numbers.shape)}")
        if not torch.isfinite(numbers).all():
            raise ValueError(f"{name} must be finite")

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
            # At 0 and at 1 one of the logarithms would be infinite.
            return send(-(-uniform.clamp(1e-10, 1 - 1e-7).log()).log(), self.device)


def _size(images: Tensor) -> tuple[int, int]:
    """Height and width of frames [B, 3, H, W]."""
    return images.shape[2], images.shape[3]
