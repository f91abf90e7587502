"""The fine-tuning loss: the answers' likelihood, weighted by return (RALW, Xia et al. 2026, Eq. 6)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...streams import Fetch, send
from ..answer.grammar import ActionGrammar
from ..decode.decoder import Layout
from ..model.backbones import Backbone, ImageFeatures
from ..model.rows import Prefix, RecordingCache, TrainingCache, arrange
from .config import TunerConfig

IGNORE = -100


@dataclass(frozen=True)
class Samples:
    """The `N` samples of a round, tokenised. Labels and weights stay on the host. The weights are computed
    where the returns are; whoever reads them first waits for their arrival."""

    frames: Tensor
    """uint8[N, 3, H, W]."""
    answers: Tensor
    """int64[N, L]: the answer to each frame, padded."""
    labels: Tensor
    """int64[N, L]: the same with -100 where padded. Only answers are learned: the prompt has no labels."""
    weighed: Fetch
    """`weights`, and whether all returns were finite, on their way from the device of the returns."""
    episodes: Tensor
    """int64[N] on the host: the episode of each sample."""

    @classmethod
    def build(
        cls,
        grammar: ActionGrammar,
        frames: Tensor,
        actions: Tensor,
        returns: Tensor,
        episodes: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> "Samples":
        """For the arguments see `VLMTuner.start`."""
        answers = grammar.encode(actions.detach().cpu())
        last = (answers == grammar.eos_token_id).int().argmax(1, keepdim=True)
        padding = torch.arange(answers.shape[1]) > last
        weights = ops.return_weights(returns.detach().float()) if weights is None else weights.float()
        weighed = Fetch(weights, torch.isfinite(returns).all())
        episodes = torch.arange(len(frames)) if episodes is None else episodes.cpu()
        return cls(frames, answers, answers.masked_fill(padding, IGNORE), weighed, episodes)

    @cached_property
    def weights(self) -> Tensor:
        """float32[N] on the host, in [0, 1]: those that were given, or RALW's. They decide which rows are
        computed at all.

        Raises:
            ValueError: a return is NaN or infinite.
        """
        weights, finite = self.weighed.read()
        if not finite:
            raise ValueError("returns must be finite")
        return weights

    def lengths(self, rows: Tensor) -> Tensor:
        """Tokens in each answer, int64[M], for `rows` int64[M]."""
        return (self.labels[rows] != IGNORE).sum(1)

    def valid_tokens(self, rows: Tensor) -> int:
        """N_v of Eq. 6: label tokens of `rows` int64[M], zero-weight rows included."""
        return int(self.lengths(rows).sum())

    def micro_batches(self, rows: Tensor, size: int) -> Iterator[Tensor]:
        """The rows with a non-zero weight, in parts of at most `size`. The other rows need no forward."""
        rows = rows[self.weights[rows] > 0]
        if len(rows):
            yield from rows.split(size)


def record_prefix(backbone: Backbone, layout: Layout) -> Prefix:
    """Keys and values of the prompt's text prefix, which is not empty. Differentiable."""
    length = len(layout.prefix)
    cache = RecordingCache()
    rows = arrange(backbone.attention, torch.tensor([length]), length, 0, backbone.device)
    backbone.hidden(backbone.embed(layout.prefix)[None], layout.positions[..., :length], rows, cache)
    return cache.prefix


class AnswerModel:
    """Hidden states at the positions that predict the answer, for a batch of frames.

    The prompt's text prefix is computed once per micro-batch and shared by its rows. Recomputation of
    activations cannot go through a cache, so with `checkpointing` every row repeats the prefix. Answers of
    different lengths are packed where `arrange` packs for the backbone's attention.
    """

    def __init__(self, backbone: Backbone, layout: Layout, *, checkpointing: bool) -> None:
        self.backbone = backbone
        self.layout = layout
        self.checkpointing = checkpointing

    def hidden(self, image: ImageFeatures, answers: Tensor, lengths: Tensor) -> Tensor:
        """[B, L, D] for answers int64[B, L]: position t predicts token t, up to the answer's end.

        `lengths` int64[B], on the host, are the tokens of each answer.
        """
        backbone, layout = self.backbone, self.layout
        count, length = answers.shape
        answers = send(answers, backbone.device)
        prompt = torch.cat((layout.prefix, layout.body)) if self.checkpointing else layout.body
        prefix_length = layout.prompt_length - len(prompt)
        tokens = torch.cat((prompt.expand(count, -1), answers[:, :-1]), 1)
        width = tokens.shape[1]
        rows = arrange(backbone.attention, lengths + len(prompt) - 1, width, prefix_length, backbone.device)
        cache = TrainingCache(record_prefix(backbone, layout), rows) if prefix_length else None
        hidden = backbone.hidden(
            backbone.embed(tokens),
            layout.positions[..., prefix_length : prefix_length + width],
            rows,
            cache,
            image_at=layout.image_at + (len(prompt) - len(layout.body)),
            image=image,
        )
        return hidden[:, -length:]

    def image(self, frames: Tensor) -> ImageFeatures:
        """Image features of frames uint8[B, 3, H, W]."""
        return self.backbone.image_features(frames)


class RoundImages:
    """Image features of a round's samples, of which the round looks at `rows`.

    Features that training does not change are computed once, here, and kept: n x D numbers for each row.
    `generator`, on the CPU, draws the random shifts.
    """

    def __init__(
        self,
        model: AnswerModel,
        samples: Samples,
        rows: Tensor,
        config: TunerConfig,
        generator: torch.Generator,
    ) -> None:
        self._model = model
        self._samples = samples
        self._shift = config.shift
        self._generator = generator
        self._kept: ImageFeatures | None = None
        if config.cache_image_features and config.mode == "lora" and config.shift == 0:
            self._place = torch.full((len(samples.weights),), -1, dtype=torch.int64)
            self._place[rows] = torch.arange(len(rows))
            self._kept = self._frozen_features(rows.split(config.micro_batch))

    def _frozen_features(self, parts: Sequence[Tensor]) -> ImageFeatures | None:
        """The features of all parts of the rows; None if they depend on trained weights."""
        features: list[ImageFeatures] = []
        for rows in parts:
            features.append(self._model.image(self._samples.frames[rows]))
            if features[-1].requires_grad:
                return None
        deep = zip(*(part.deep for part in features), strict=True)
        return ImageFeatures(torch.cat([part.tokens for part in features]), tuple(map(torch.cat, deep)))

    def __call__(self, rows: Tensor) -> ImageFeatures:
        """The features of `rows` int64[M]."""
        if self._kept is None:
            return self._model.image(self._samples.frames[rows])
        return self._kept.rows(send(self._place[rows], self._kept.tokens.device))

    def shifted(self, rows: Tensor) -> ImageFeatures:
        """The same for randomly shifted frames, for training."""
        if self._shift == 0:
            return self(rows)
        frames = self._samples.frames[rows]
        offsets = torch.randint(2 * self._shift + 1, (len(rows), 2), generator=self._generator)
        moved = ops.random_shift(frames, offsets.to(frames.device), self._shift, dtype=torch.uint8)
        return self._model.image(moved)


def weighted_loss(
    model: AnswerModel,
    samples: Samples,
    rows: Tensor,
    image: ImageFeatures,
    valid: int,
    label_smoothing: float,
) -> Tensor:
    """The part of `rows` int64[M], with features `image`, in Eq. 6 over a batch with `valid` label tokens
    (N_v): a differentiable scalar."""
    labels, weights = samples.labels[rows], samples.weights[rows]
    hidden = model.hidden(image, samples.answers[rows], samples.lengths(rows))
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "ignore_index": IGNORE}
    head = model.backbone.plain_head
    if head is not None:
        loss = ops.return_weighted_linear_cross_entropy(hidden, head.weight, labels, weights, **options)
    else:
        loss = ops.return_weighted_cross_entropy(model.backbone.head(hidden), labels, weights, **options)
    # The op divides by the label tokens of these rows, Eq. 6 by those of the whole batch.
    return loss * (samples.valid_tokens(rows) / valid)
