"""Constrained decoding: answers for a batch of frames, without computing what the grammar already says."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..answer.grammar import ActionGrammar, Level
from ..model.backbones import Backbone, ImageFeatures
from .head import TokenScores
from .numbers import NumberReader, entropy
from .transformer import KeyValueCache, Transformer


@dataclass(frozen=True)
class Layout:
    """The tokens of a prompt for frames of one size: a text prefix, then the image and the closing text."""

    prefix: Tensor
    """int64[P]: everything before the first image token."""
    body: Tensor
    """int64[R]: from the first image token to the end of the prompt."""
    image_at: Tensor
    """int64[n]: places of the image tokens in `body`."""
    positions: Tensor
    """Position ids [..., 1, P + R + L] of the prompt and of an answer of L tokens, the grammar's longest."""

    @property
    def prompt_length(self) -> int:
        return len(self.prefix) + len(self.body)


def make_layout(backbone: Backbone, text: str, size: tuple[int, int], answer_length: int) -> Layout:
    """Runs the processor once on a blank frame of `size` to see how it lays out text and image."""
    inputs = backbone.process(text, torch.zeros(1, 3, *size, dtype=torch.uint8))
    tokens = inputs["input_ids"][0]
    image = (tokens == backbone.image_token_id).nonzero()[:, 0]
    begin = int(image[0])
    device = backbone.device
    return Layout(
        prefix=tokens[:begin].to(device),
        body=tokens[begin:].to(device),
        image_at=(image - begin).to(device),
        positions=backbone.positions(inputs, answer_length).to(device),
    )


class _Choice:
    """A level of the grammar, with the model's weights for its tokens."""

    def __init__(self, level: Level, backbone: Backbone) -> None:
        self.scores = TokenScores(backbone, level.tokens)
        """For the U tokens that the level allows, which are `columns` int64[U]."""
        self.columns = level.tokens
        self.forbidden = ~level.allowed
        """bool[S, U]"""
        self.tokens = torch.cat((level.tokens[:, None], level.forced.expand(len(level.tokens), -1)), 1)
        """int64[U, 1 + R]: a choice and the tokens that it forces."""
        self.embeddings = backbone.embed(self.tokens)
        self.gain, self.next_state = level.gain, level.next_state


class DecoderWeights:
    """What decoding takes from a backbone and a grammar; shared by the decoders of all frame sizes.

    The weights are those of the time of the call. When the backbone's change, make a new object.
    """

    @torch.no_grad()
    def __init__(self, backbone: Backbone, grammar: ActionGrammar) -> None:
        self.transformer = Transformer(backbone)
        self.choices = [_Choice(level.to(backbone.device), backbone) for level in grammar.levels]
        self.grammar = grammar
        self.embed = backbone.embed
        self.opening = grammar.opening.to(backbone.device)
        """int64[K]: the tokens that every answer begins with."""
        self._backbone = backbone
        self._readers: dict[tuple[int, ...], NumberReader] = {}

    def reader(self, slots: Sequence[int]) -> NumberReader:
        """Reads these numbers of answers."""
        slots = tuple(slots)
        if slots not in self._readers:
            self._readers[slots] = NumberReader(self._backbone, self.grammar, self.transformer, slots)
        return self._readers[slots]


class Decoder:
    """Decodes frames of one layout.

    Keys and values of the prefix are computed once. A call then costs one forward over the image, the end
    of the prompt and the opening of the answer, and one forward per choice but the last. Tokens that a choice
    forces are part of its forward. Of a plain head only the rows of the allowed tokens are used. The host
    reads nothing back.
    """

    @torch.no_grad()
    def __init__(self, weights: DecoderWeights, layout: Layout) -> None:
        self.weights = weights
        self._layout = layout
        self._transformer = weights.transformer
        self._attention = weights.transformer.attention(layout.positions)
        self._body = weights.embed(torch.cat((layout.body, weights.opening)))[None]
        self._prefix = self._transformer.new_cache(1, len(layout.prefix))
        if len(layout.prefix):
            self._transformer(weights.embed(layout.prefix)[None], self._attention, self._prefix)
        self._caches: dict[int, KeyValueCache] = {}

    def __call__(
        self, image: ImageFeatures, temperature: float, noise: Tensor | None, *, confidence: bool = False
    ) -> tuple[Tensor, ...]:
        """Actions float32[B, A], answer tokens int64[B, L] and, if asked for, confidences float32[B].

        Args:
            temperature: 0 takes the most probable token of each choice.
            noise: Gumbel noise float32[B, levels, >= U] for `temperature` > 0: the argmax of logits / T plus
                this noise is a sample of their softmax.
            confidence: see `PriorBatch.confidence`. It costs one forward over the trees of all numbers.
        """
        cache = self._cache(len(image.tokens))
        return self.decode(cache, image, temperature, noise, confidence=confidence)

    @torch.no_grad()
    def decode(
        self,
        cache: KeyValueCache,
        image: ImageFeatures,
        temperature: float | Tensor,
        noise: Tensor | None,
        *,
        confidence: bool = False,
    ) -> tuple[Tensor, ...]:
        """The same with a cache of `new_cache` for B rows, and a temperature that may be float32[B, 1]."""
        weights, batch = self.weights, len(image.tokens)
        hidden = self.prefill(cache, image)[:, -1]
        state = torch.zeros(batch, dtype=torch.int64, device=hidden.device)
        action = torch.zeros(batch, weights.grammar.action_dim, dtype=torch.float32, device=hidden.device)
        answer = [weights.opening.expand(batch, -1)]
        for i, choice in enumerate(weights.choices):
            scores = choice.scores(hidden)
            if noise is not None:
                scores = scores / temperature + noise[:, i, : scores.shape[1]]
            chosen = scores.masked_fill_(choice.forbidden.index_select(0, state), -torch.inf).argmax(1)
            action += choice.gain[state, chosen]
            state = choice.next_state[state, chosen]
            answer.append(choice.tokens.index_select(0, chosen))
            if i + 1 < len(weights.choices):
                embeddings = choice.embeddings.index_select(0, chosen)
                hidden = self._transformer(embeddings, self._attention, cache)[:, -1]
        tokens = torch.cat(answer, 1)
        return (action, tokens, self._confidence(cache, tokens, action)) if confidence else (action, tokens)

    def prefill(self, cache: KeyValueCache, image: ImageFeatures, answers: Tensor | None = None) -> Tensor:
        """Begins a cache with image, end of the prompt and opening. Returns the last hidden state [B, 1, D].

        `answers` int64[B, n], the tokens after the opening, are run with them, and give [B, 1 + n, D].
        """
        cache.length = self._prefix.length
        x, count = self._body.expand(len(image.tokens), -1, -1), 1
        if answers is not None:
            x, count = torch.cat((x, self.weights.embed(answers)), 1), 1 + answers.shape[1]
        return self._transformer(
            x, self._attention, cache, image_at=self._layout.image_at, image=image, outputs=count
        )

    def numbers(
        self, cache: KeyValueCache, slots: Sequence[int], answers: Tensor, places: Tensor
    ) -> list[Tensor]:
        """The distributions of these numbers of answers int64[B, L]; see `NumberReader`."""
        text = torch.cat((self._layout.body[-1:].expand(len(answers), 1), answers), 1)
        read = self.weights.reader(slots)
        return read(cache, self._attention, self._layout.prompt_length, text, places)

    def _confidence(self, cache: KeyValueCache, answers: Tensor, actions: Tensor) -> Tensor:
        """float32[B]: 1 - H / (A log G), H the sum of the entropies of the answer's numbers."""
        grammar = self.weights.grammar
        numbers = self.numbers(cache, range(grammar.action_dim), answers, grammar.places(actions))
        most = len(numbers) * math.log(len(grammar.grid))
        return (1 - torch.stack([entropy(x) for x in numbers]).sum(0) / most).clamp(0, 1)

    def new_cache(self, batch: int) -> KeyValueCache:
        """A cache of `batch` rows that begins with the prefix."""
        capacity = self._layout.prompt_length + self.weights.grammar.max_length
        return self._transformer.new_cache(batch, capacity, self._prefix)

    def _cache(self, batch: int) -> KeyValueCache:
        """The cache for this batch size. Two are kept: for full batches and for the last one."""
        if batch not in self._caches:
            if len(self._caches) == 2:
                del self._caches[next(iter(self._caches))]
            self._caches[batch] = self.new_cache(batch)
        return self._caches[batch]
