"""Constrained decoding: answers for a batch of frames, without computing what the grammar already says."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..answer.grammar import ActionGrammar, Level
from ..model.backbones import Backbone, ImageFeatures
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
        plain = backbone.plain_head
        self._head, self._head_tokens = backbone.head, level.tokens
        self._head_rows = None if plain is None else plain.weight[level.tokens]
        """[U, D]"""
        self.forbidden = ~level.allowed
        """bool[S, U]"""
        self.tokens = torch.cat((level.tokens[:, None], level.forced.expand(len(level.tokens), -1)), 1)
        """int64[U, 1 + R]: a choice and the tokens that it forces."""
        self.embeddings = backbone.embed(self.tokens)
        self.gain, self.next_state = level.gain, level.next_state

    def scores(self, hidden: Tensor) -> Tensor:
        """float32[B, U]: the logits of the tokens for hidden states [B, D]."""
        if self._head_rows is not None:
            return F.linear(hidden, self._head_rows).float()
        logits: Tensor = self._head(hidden)
        return logits[:, self._head_tokens].float()


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


class Decoder:
    """Decodes frames of one layout.

    Keys and values of the prefix are computed once. A call then costs one forward over the image, the end
    of the prompt and the opening of the answer, and one forward per choice but the last. Tokens that a choice
    forces are part of its forward. Of a plain head only the rows of the allowed tokens are used. The host
    reads nothing back.
    """

    @torch.no_grad()
    def __init__(self, weights: DecoderWeights, layout: Layout) -> None:
        self._weights = weights
        self._image_at = layout.image_at
        self._capacity = layout.prompt_length + weights.grammar.max_length
        self._transformer = weights.transformer
        self._attention = weights.transformer.attention(layout.positions)
        self._body = weights.embed(torch.cat((layout.body, weights.opening)))[None]
        self._prefix = self._transformer.new_cache(1, len(layout.prefix))
        if len(layout.prefix):
            self._transformer(weights.embed(layout.prefix)[None], self._attention, self._prefix)
        self._caches: dict[int, KeyValueCache] = {}

    def __call__(
        self, image: ImageFeatures, temperature: float, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Actions float32[B, A] and answer tokens int64[B, L].

        Args:
            temperature: 0 takes the most probable token of each choice.
            noise: Gumbel noise float32[B, levels, >= U] for `temperature` > 0: the argmax of logits / T plus
                this noise is a sample of their softmax.
        """
        return self.decode(self._cache(len(image.tokens)), image, temperature, noise)

    @torch.no_grad()
    def decode(
        self, cache: KeyValueCache, image: ImageFeatures, temperature: float | Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same with a cache of `new_cache` for B rows, and a temperature that may be float32[B, 1]."""
        weights, batch = self._weights, len(image.tokens)
        cache.length = self._prefix.length
        body = self._body.expand(batch, -1, -1)
        hidden = self._transformer(body, self._attention, cache, image_at=self._image_at, image=image)[:, -1]
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
        return action, torch.cat(answer, 1)

    def new_cache(self, batch: int) -> KeyValueCache:
        """A cache of `batch` rows that begins with the prefix."""
        return self._transformer.new_cache(batch, self._capacity, self._prefix)

    def _cache(self, batch: int) -> KeyValueCache:
        """The cache for this batch size. Two are kept: for full batches and for the last one."""
        if batch not in self._caches:
            if len(self._caches) == 2:
                del self._caches[next(iter(self._caches))]
            self._caches[batch] = self.new_cache(batch)
        return self._caches[batch]
