"""The fine-tuning loss: the answers' likelihood, weighted by return (RALW, Xia et al. 2026, Eq. 6)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from covr_fast import ops

from ..answer.grammar import ActionGrammar
from ..decode.decoder import Layout, record_prefix
from ..model.backbones import Backbone, ImageFeatures
from ..model.rows import TrainingCache, arrange

IGNORE = -100


@dataclass(frozen=True)
class Samples:
    """The kept samples of a round, tokenised. `N` rows; labels and weights stay on the host."""

    frames: Tensor
    """uint8[N, 3, H, W]."""
    answers: Tensor
    """int64[N, L]: the answer to each frame, padded."""
    labels: Tensor
    """int64[N, L]: the same with -100 where padded. The prompt has no labels: only answers are learned."""
    weights: Tensor
    """float32[N]: RALW weights, in [0, 1]."""

    @classmethod
    def build(cls, grammar: ActionGrammar, frames: Tensor, actions: Tensor, returns: Tensor) -> "Samples":
        actions = actions.detach().cpu()
        answers = grammar.encode(actions)
        padding = torch.arange(answers.shape[1]) >= grammar.lengths(actions)[:, None]
        weights = ops.return_weights(returns.detach().cpu().float())
        return cls(frames, answers, answers.masked_fill(padding, IGNORE), weights)

    def lengths(self, rows: Tensor) -> Tensor:
        """Tokens int64[M] of the answers of `rows` int64[M]."""
        return (self.labels[rows] != IGNORE).sum(1)

    def valid_tokens(self, rows: Tensor) -> int:
        """N_v of Eq. 6: label tokens of `rows` int64[M], zero-weight rows included."""
        return int(self.lengths(rows).sum())

    def micro_batches(self, rows: Tensor, size: int) -> Iterator[Tensor]:
        """The rows with a non-zero weight in pieces of at most `size`: the others need no forward at all."""
        rows = rows[self.weights[rows] > 0]
        if len(rows):
            yield from rows.split(size)


class AnswerModel:
    """Hidden states at the positions that predict the answer, for a batch of frames.

    The prompt's text prefix is run once per micro-batch and shared by its rows; with `checkpointing`, whose
    recomputation cannot go through a cache, every row carries it. Answers of different lengths are packed if
    the backbone's attention is of those that `packing.arrange` packs for.
    """

    def __init__(self, backbone: Backbone, layout: Layout, *, checkpointing: bool) -> None:
        self.backbone = backbone
        self.layout = layout
        self.checkpointing = checkpointing

    def hidden(self, image: ImageFeatures, answers: Tensor, lengths: Tensor) -> Tensor:
        """[B, L, D] for answers int64[B, L] of `lengths` int64[B] on the host: position t predicts token t.

        Positions behind an answer's end mean nothing.
        """
        backbone, layout = self.backbone, self.layout
        count, length = answers.shape
        answers = answers.to(backbone.device, non_blocking=True)
        prompt = torch.cat((layout.prefix, layout.body)) if self.checkpointing else layout.body
        held = layout.prompt_length - len(prompt)
        tokens = torch.cat((prompt.expand(count, -1), answers[:, :-1]), 1)
        rows = arrange(backbone.attention, lengths + len(prompt) - 1, tokens.shape[1], held, backbone.device)
        cache = None
        if not self.checkpointing:
            cache = TrainingCache(record_prefix(backbone, layout), rows)
        hidden = backbone.hidden(
            backbone.embed(tokens),
            layout.span(held, held + tokens.shape[1]),
            rows,
            cache,
            image_at=layout.image_at + (len(prompt) - len(layout.body)),
            image=image,
        )
        return hidden[:, -length:]

    def image(self, frames: Tensor) -> ImageFeatures:
        backbone = self.backbone
        return backbone.image_features(backbone.pixels(frames), len(frames), self.layout.size)


class RoundImages:
    """Image features of a round's samples by row, computed when asked for or, `cached`, once for the round.

    The cache holds the features of `rows`, those that the round looks at: n x D numbers each. Features that
    depend on weights that are trained are not cached. `shift` is the largest random shift of `shifted`, in
    pixels.
    """

    def __init__(
        self,
        model: AnswerModel,
        samples: Samples,
        rows: Tensor,
        *,
        cached: bool,
        micro_batch: int,
        shift: int,
        generator: torch.Generator,
    ) -> None:
        self._model = model
        self._samples = samples
        self._shift = shift
        self._generator = generator
        self._cache: ImageFeatures | None = None
        if cached:
            self._place = torch.full((len(samples.weights),), -1, dtype=torch.int64)
            self._place[rows] = torch.arange(len(rows))
            self._cache = self._computed(rows.split(micro_batch))

    def _computed(self, rows: Sequence[Tensor]) -> ImageFeatures | None:
        """The features of all pieces of rows; None if they depend on weights that are trained."""
        parts: list[ImageFeatures] = []
        for piece in rows:
            parts.append(self._model.image(self._samples.frames[piece]))
            if parts[-1].requires_grad:
                return None
        deep = zip(*(part.deep for part in parts), strict=True)
        return ImageFeatures(torch.cat([part.tokens for part in parts]), tuple(map(torch.cat, deep)))

    def __call__(self, rows: Tensor) -> ImageFeatures:
        if self._cache is None:
            return self._model.image(self._samples.frames[rows])
        return self._cache.rows(self._place[rows].to(self._cache.tokens.device))

    def shifted(self, rows: Tensor) -> ImageFeatures:
        """The features of randomly shifted frames, for training; those of `self(rows)` without a shift."""
        if self._shift == 0:
            return self(rows)
        frames = self._samples.frames[rows]
        offsets = torch.randint(2 * self._shift + 1, (len(rows), 2), generator=self._generator)
        return self._model.image(
            ops.random_shift(frames, offsets.to(frames.device), self._shift, dtype=torch.uint8)
        )


def weighted_loss(
    model: AnswerModel,
    samples: Samples,
    rows: Tensor,
    image: ImageFeatures,
    valid: int,
    label_smoothing: float,
) -> Tensor:
    """What `rows` add to Eq. 6 over a batch with `valid` label tokens (N_v). Differentiable scalar."""
    labels, weights = samples.labels[rows], samples.weights[rows]
    hidden = model.hidden(image, samples.answers[rows], samples.lengths(rows))
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "ignore_index": IGNORE}
    head = model.backbone.plain_head
    if head is not None:
        loss = ops.return_weighted_linear_cross_entropy(hidden, head.weight, labels, weights, **options)
    else:
        loss = ops.return_weighted_cross_entropy(model.backbone.head(hidden), labels, weights, **options)
    # The op divides by the label tokens it was given; Eq. 6 divides by all of the batch's.
    return loss * (samples.valid_tokens(rows) / valid)


@torch.no_grad()
def mean_nll(
    model: AnswerModel, samples: Samples, rows: Tensor, images: RoundImages, micro_batch: int
) -> float:
    """Mean of -log p over the answer tokens of `rows`, in nats per token; the held-out figure.

    Unlike Eq. 6 it weights all kept samples alike: a few outliers in return set the weights, and most are 0.
    """
    if len(rows) == 0:
        return float("nan")
    total = torch.zeros((), dtype=torch.float32, device=model.backbone.device)
    for part in rows.split(micro_batch):
        labels = samples.labels[part].to(total.device)
        hidden = model.hidden(images(part), samples.answers[part], samples.lengths(part))
        logits = model.backbone.head(hidden).float()
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return float(total) / samples.valid_tokens(rows)
