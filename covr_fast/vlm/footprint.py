"""How much memory a VLM takes to answer and to be tuned, part by part, from shapes alone.

The prior and the tuner are built on torch's meta device and make a call and a step of a round there, by the
code that a GPU runs; `live_bytes` counts the tensors. What only kernels allocate is added by hand: the chunk
of logits of the fused loss.
"""

import math
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..live_bytes import LiveBytes, nbytes, tensors_in
from ..ops._projection import CHUNK_BYTES
from .decode.decoder import Decoder, DecoderWeights, Layout
from .decode.projection import BesideLora
from .finetune.config import TunerConfig
from .finetune.held_out import served_nll
from .finetune.lora import make_replica, trainable
from .finetune.masters import Masters
from .finetune.objective import IGNORE, AnswerModel, RoundImages, Samples
from .mode import own_mode
from .model.backbones import Backbone
from .model.loading import Settings, Source, find_model
from .model.on_meta import META, open_on_meta, quantized_bytes, shapes_only, weights_in_files
from .prior import ActionPrior
from .tuner import VLMTuner


class Part(NamedTuple):
    """Memory for one purpose."""

    name: str
    nbytes: int
    how: str
    """The arithmetic, for people."""
    passing: bool = False
    """It is taken only while its owner works, and then given back."""


@dataclass(frozen=True)
class Request:
    """What a VLM is asked to do."""

    model: str
    """"nano", a checkpoint directory, the directory of an adapter, or a hub id."""
    action_dim: int
    size: tuple[int, int]
    """Height and width of the frames."""
    rows: int
    """Frames of one call."""
    samples: int
    """Samples of a round, those that the filter keeps."""
    tuner: TunerConfig
    prompt: str | None = None
    decimals: int = 2
    device_type: Literal["cpu", "cuda"] = "cuda"
    dtype: torch.dtype | None = None
    """None: that of a saved prior, else bfloat16 on a GPU and float32 on a CPU."""
    quantization: Literal["auto", "none", "8bit", "4bit"] = "auto"
    """auto: like the base of a saved adapter, else like the checkpoint."""
    image_size: int = 0
    """The longer side of the frames as the VLM sees them, in pixels; 0 for frames as they are."""
    graph: bool = True
    """Decode as CUDA graphs, whose memory is kept between calls."""
    confidence: bool = False
    """Answers come with their confidences."""


@dataclass(frozen=True)
class Footprint:
    """The memory of a VLM."""

    serving: list[Part]
    tuning: list[Part]
    dtype: torch.dtype
    bits: int | None
    """Of quantized linear layers."""
    image_tokens: int
    """Tokens of one frame."""
    prompt_tokens: int
    """Tokens before the answer, those of the frame included."""


def footprint(request: Request) -> Footprint:
    """The memory of a VLM that answers and is tuned as `request` says, in bytes. No weights are read.

    Raises:
        OSError: there is no such model, or the base of this adapter cannot be found.
        ValueError: it has no configuration; the architecture or the adapter is not supported.
    """
    source = _found(request.model)
    saved = Settings.load(source.folder) if source.folder is not None else None
    dtype = request.dtype or (getattr(torch, saved.dtype) if saved and saved.dtype else None)
    dtype = dtype or (torch.bfloat16 if request.device_type == "cuda" else torch.float32)
    name = str(dtype).removeprefix("torch.")
    settings = Settings(
        source.name,
        0,
        request.action_dim,
        request.decimals,
        request.prompt,
        name,
    )
    config = request.tuner
    model = _model(source, settings, config.mode, config.lora_rank)
    bits = _ASKED.get(request.quantization)
    if request.quantization == "auto":
        own = getattr(model.prior.backbone.base.config, "quantization_config", None)
        bits = _bits(saved.quantization if saved else None) or _bits(own)
    serving = [_base(model, bits), *_answering(model, request, bits)]
    layout = model.layout(request.image_size, request.size)
    return Footprint(serving, _round(model, request), dtype, bits, len(layout.image_at), layout.prompt_length)


_ASKED: dict[str, Literal[4, 8]] = {"8bit": 8, "4bit": 4}


def _bits(quantization: Any) -> Literal[4, 8] | None:
    """Bits of the linear layers in settings of bitsandbytes, which may be None."""
    if quantization is None:
        return None
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if settings.get("load_in_4bit"):
        return 4
    return 8 if settings.get("load_in_8bit") else None


# ---- what runs on the meta device ----


@lru_cache(maxsize=4)
def _found(model: str) -> Source:
    return find_model(model, weights=False)


@lru_cache(maxsize=4)
def _model(source: Source, settings: Settings, mode: Literal["lora", "full"], rank: int) -> "_Model":
    return _Model(source, settings, mode, rank)


class _Model:
    """Prior and tuner on the meta device. What they take is found out once for each question."""

    def __init__(self, source: Source, settings: Settings, mode: Literal["lora", "full"], rank: int) -> None:
        self.source = source
        # SDPA: FlashAttention cannot be imported everywhere, and keeps no more.
        backbone = open_on_meta(source, getattr(torch, str(settings.dtype)), "sdpa")
        self.weights = (
            list(backbone.base.parameters())
            if not backbone.adapted
            else [p for p in backbone.base.parameters() if not p.requires_grad]
        )
        """Those of the base."""
        self.prior = ActionPrior(backbone, settings)
        self.tuner = VLMTuner(self.prior, TunerConfig(mode=mode, lora_rank=rank))
        self.answering = cache(self._answering)
        self.micro_batch = cache(self._micro_batch)
        self.held_out = cache(self._held_out)

    def layout(self, image_size: int, size: tuple[int, int]) -> Layout:
        """That of frames of `size` which the VLM sees with a longer side of `image_size`, from now on."""
        if self.prior.image_size != image_size:
            self.prior.image_size = self.tuner._backbone.image_size = image_size
        return self.prior.layout(size)

    def _answering(self, image_size: int, size: tuple[int, int], rows: int, confidence: bool) -> "_Answering":
        prior, layout = self.prior, self.layout(image_size, size)
        with own_mode(META), shapes_only(rows * len(layout.image_at)):
            weights = DecoderWeights(prior.backbone, prior.grammar)
            decoder = Decoder(weights, layout)
            cache = decoder.new_cache(rows)
            caches = nbytes(tensors_in(cache))
            prior._decoders[size] = decoder
            with LiveBytes("meta") as memory:
                prior._decode(_frames(rows, size), 0.0, None, confidence=confidence)
        model = list(tensors_in(prior.backbone.model))
        served = list(tensors_in(weights.transformer))
        return _Answering(
            served=nbytes(served, without=model),
            beside=any(isinstance(x, BesideLora) for x in vars(weights.transformer._layers[0]).values()),
            prompt=nbytes(tensors_in([weights, decoder]), without=[*model, *served]) - caches,
            caches=caches,
            capacity=cache.layers[0].keys.shape[2],
            working=memory.peak - caches,
        )

    def _micro_batch(
        self, image_size: int, size: tuple[int, int], rows: int, checkpointing: bool, device_type: str
    ) -> "_MicroBatch":
        """The training loss of `rows` samples, forward and backward."""
        prior, backbone, layout = self.prior, self.tuner._backbone, self.layout(image_size, size)
        if checkpointing:
            attention = backbone.attention
            backbone = make_replica(backbone, self.tuner.config.mode)
            backbone.attention = attention
            backbone.checkpoint_activations()
        frames = _frames(rows, size)
        # Negative numbers have the longest spelling. One answer is shorter, so that rows are packed.
        actions = torch.full((rows, prior.action_dim), -0.4)
        actions[0] = 0.4
        samples = Samples.build(prior.grammar, frames, actions, torch.ones(rows))
        lengths = samples.lengths(torch.arange(rows))
        model = AnswerModel(backbone, layout, checkpointing=checkpointing)
        weights = trainable(backbone.model)
        with own_mode(META, grad=True), shapes_only(rows * len(layout.image_at)):
            for weight in weights:
                weight.grad = torch.zeros_like(weight)  # as after an earlier micro-batch
            with LiveBytes("meta") as memory:
                features = model.image(frames)
                frozen = not features.requires_grad
                feature = nbytes([features.tokens, *features.deep]) // rows
                hidden = model.hidden(features, samples.answers, lengths)
                loss = _loss(backbone, hidden, samples.labels)
                del features, hidden
                kept = memory.now
                torch.autograd.backward(loss)
            for weight in weights:
                weight.grad = None
        head = backbone.head.weight
        tokens, row = int(lengths.sum()), head.shape[0] * head.itemsize
        chunk = max(1, CHUNK_BYTES[device_type] // row)
        logits = min(tokens, chunk) * row
        if head.requires_grad and tokens > chunk:
            logits += head.numel() * 4  # the head's gradient is summed in float32
        return _MicroBatch(
            tokens=layout.prompt_length + samples.answers.shape[1] - 1,
            feature=feature,
            frozen=frozen,
            kept=kept,
            peak=memory.peak,
            logits=logits,
        )

    def _held_out(self, image_size: int, size: tuple[int, int], rows: int) -> int:
        """Bytes of the loss of `rows` samples that are held out, by the decoder that answers."""
        prior, backbone, layout = self.prior, self.tuner._backbone, self.layout(image_size, size)
        actions = torch.full((rows, prior.action_dim), -0.4)
        samples = Samples.build(prior.grammar, _frames(rows, size), actions, torch.ones(rows))
        model, every = AnswerModel(backbone, layout, checkpointing=False), torch.arange(rows)
        with own_mode(META), shapes_only(rows * len(layout.image_at)):
            images = RoundImages(model, samples, every, TunerConfig(shift=1), torch.Generator())
            with LiveBytes("meta") as memory:
                served_nll(backbone, layout, samples, every, images, rows)
        peak: int = memory.peak
        return peak

    @cached_property
    def optimizer(self) -> "_Optimizer":
        """The optimizer of `round.run_round`."""
        weights = trainable(self.tuner._backbone.model)
        with own_mode(META, grad=True), shapes_only(0):
            masters = Masters(weights)
            optimizer = torch.optim.AdamW(masters.values, foreach=True)
            for weight in masters.values:
                weight.grad = torch.zeros_like(weight)
            with LiveBytes("meta") as memory:
                optimizer.step()
                state = memory.peak = memory.now
                nn.utils.clip_grad_norm_(masters.values, 1.0)
                optimizer.step()
            for weight in weights:
                weight.grad = None
        return _Optimizer(nbytes(masters.values, without=weights), state, memory.peak - state)


def _frames(rows: int, size: tuple[int, int]) -> Tensor:
    return torch.zeros(rows, 3, *size, dtype=torch.uint8, device=META)


class _Answering(NamedTuple):
    """Bytes of a prior, for a call of some rows."""

    served: int
    """Of the decoder's weights, besides the model's own."""
    beside: bool
    """LoRA is served beside the weights, and not merged into a copy."""
    prompt: int
    """Of the grammar's tokens, and of the prompt."""
    caches: int
    capacity: int
    """Tokens of a cache's row."""
    working: int
    """During a call."""


class _Optimizer(NamedTuple):
    """Bytes of an optimizer."""

    masters: int
    """Float32 copies of half-precision weights."""
    state: int
    scratch: int
    """What a step needs besides."""


class _MicroBatch(NamedTuple):
    """Bytes of a micro-batch."""

    tokens: int
    """Of a row: prompt and answer."""
    feature: int
    """Of the image features of a sample."""
    frozen: bool
    """Training does not change them."""
    kept: int
    """Between forward and backward."""
    peak: int
    logits: int
    """A chunk of the fused loss."""


def _loss(backbone: Backbone, hidden: Tensor, labels: Tensor) -> Tensor:
    """`objective.weighted_loss` as a GPU computes it, without its values."""
    head = backbone.plain_head
    if head is None:
        logits: Tensor = backbone.head(hidden)
        return logits.float().log_softmax(-1).sum()
    loss: Tensor
    loss, _, _ = torch.ops.covr_fast.linear_cross_entropy(
        hidden.flatten(0, 1),
        head.weight,
        labels.flatten(),
        (labels != IGNORE).float().flatten(),
        0.0,
        True,
        head.weight.requires_grad,
        "triton",
    )
    return loss


# ---- the parts ----


def _base(model: _Model, bits: int | None) -> Part:
    backbone, folder = model.prior.backbone, model.source.folder
    count = sum(p.numel() for p in model.weights)
    if bits is not None:
        nbytes_ = quantized_bytes([*model.weights, *backbone.base.buffers()], backbone.base, bits)
        return Part("base weights", nbytes_, f"{count:,} weights, linear layers in {bits} bits")
    how = f"{count:,} weights of {backbone.dtype.itemsize} bytes"
    stored = None if folder is None or model.source.adapted else weights_in_files(folder)
    if stored is not None:
        how += ", as many as its files hold" if stored == count else f"; but its files hold {stored:,}"
    return Part("base weights", nbytes([*model.weights, *backbone.base.buffers()]), how)


def _answering(model: _Model, request: Request, bits: int | None) -> list[Part]:
    """What the prior has besides its base, after calls of `request.rows` frames."""
    graphed = request.graph and request.device_type == "cuda" and bits is None
    rows = 1 << (request.rows - 1).bit_length() if graphed else request.rows
    took = model.answering(request.image_size, request.size, rows, request.confidence)
    # Graphs have caches for all powers of two up to `rows`; else two caches are kept.
    cached = 2 * rows - 1 if graphed else 2 * rows
    when = "kept by the CUDA graphs" if graphed else "during a call"
    parts = [
        _served(model, took),
        Part("prompt", took.prompt, "its keys and values; embeddings and head rows of the grammar's tokens"),
        Part("KV caches", took.caches // rows * cached, f"{cached} rows of {took.capacity} tokens"),
        Part("answering", took.working, f"{rows} frames at a time, {when}", passing=not graphed),
    ]
    if bits:
        parts[0] = Part("served decoder", 0, "quantized layers are called as they are")
    if model.prior.backbone.adapted:
        adapters = trainable(model.prior.backbone.model)
        how = f"{_count(adapters):,} weights of {adapters[0].itemsize} bytes"
        parts.insert(0, Part("adapters", nbytes(adapters), how))
    return parts


def _served(model: _Model, took: _Answering) -> Part:
    """What the decoder that answers has besides the model's weights."""
    if not took.beside:
        return Part("served decoder", took.served, "joined weights, a second copy")
    linear = [m.base_layer for m in model.prior.backbone.decoder.layers.modules() if hasattr(m, "base_layer")]
    copied = nbytes([module.weight for module in linear]) / 1e9
    how = f"LoRA beside the weights; {copied:.2f} once it can be merged without loss"
    return Part("served decoder", took.served, how)


def _count(weights: list[Tensor]) -> int:
    return sum(w.numel() for w in weights)


def _round(model: _Model, request: Request) -> list[Part]:
    """What a round of fine-tuning takes."""
    config, backbone = request.tuner, model.tuner._backbone
    weights = trainable(backbone.model)
    seen = request.image_size, request.size
    took = model.micro_batch(*seen, config.micro_batch, config.gradient_checkpointing, request.device_type)
    masters, state, scratch = model.optimizer
    own = nbytes(tensors_in(backbone.model), without=tensors_in(model.prior.backbone.model))
    trained = nbytes(weights)
    exact = masters or trained  # in float32
    snapshots = 2 * trained + (exact if config.average else 0)
    frozen = took.frozen and config.cache_image_features and config.shift == 0
    features = took.feature * request.samples if frozen else 0
    # While the features are joined there are two of them, but no gradients, moments or best weights yet.
    joined = features - exact - trained - state
    held_out = model.held_out(*seen, config.micro_batch)
    activations = max(took.peak, held_out, scratch, joined)
    largest = {
        took.peak: f"{config.micro_batch} samples of {took.tokens} tokens",
        held_out: f"the loss of {config.micro_batch} held-out samples, by the decoder that answers",
        scratch: "a step of AdamW",
        joined: "a second copy of the features while they are joined",
    }[activations]
    recomputed = ", recomputed by layer" if config.gradient_checkpointing and activations == took.peak else ""
    kept = f"for {request.samples:,} samples" if frozen else "not kept"
    return [
        Part("trained weights", own, f"{_count(weights):,} of {weights[0].itemsize} bytes, the tuner's copy"),
        *([Part("masters", masters, "float32 copies, which AdamW changes", passing=True)] if masters else []),
        Part("gradients", exact, "of the trained weights, in float32", passing=True),
        Part("AdamW", state, "two moments of each", passing=True),
        Part("snapshots", snapshots, "before, best" + ", average" * (config.average > 0), passing=True),
        Part("image features", features, kept, passing=True),
        Part("frames", 3 * math.prod(request.size) * request.samples, "copies of those frames", passing=True),
        Part("logits", took.logits, "a chunk of the fused loss", passing=True),
        Part("activations", activations, largest + recomputed, passing=True),
    ]
