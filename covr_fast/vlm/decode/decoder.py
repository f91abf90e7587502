"""Constrained decoding: answers for a batch of frames, and nothing computed that the grammar already says."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..answer.grammar import ActionGrammar, Level
from ..model.backbones import Backbone, ImageFeatures
from ..model.rows import Prefix, RecordingCache, arrange
from .transformer import KeyValueCache, ServingDecoder


@dataclass(frozen=True)
class Layout:
    """The tokens of a prompt for frames of one size: a text prefix, then image and closing text.

    Positions continue into the answer, `grammar.max_length` tokens further.
    """

    size: tuple[int, int]
    """Height and width of the frames."""
    prefix: Tensor
    """int64[P]: everything before the first image token."""
    body: Tensor
    """int64[R]: from the first image token to the end of the prompt."""
    image_at: Tensor
    """int64[n]: places of the image tokens in `body`."""
    positions: Tensor
    """Position ids [..., 1, P + R + answer]."""

    @property
    def prompt_length(self) -> int:
        return len(self.prefix) + len(self.body)

    def span(self, begin: int, end: int) -> Tensor:
        """Positions of the tokens from `begin` to `end`, counted from the prefix's first."""
        return self.positions[..., begin:end]


def make_layout(backbone: Backbone, text: str, size: tuple[int, int], answer_length: int) -> Layout:
    """Runs the processor once on a blank frame of `size` to see how it lays out text and image."""
    blank = torch.zeros(*size, 3, dtype=torch.uint8).numpy()
    inputs = backbone.process(text, [blank])
    tokens = inputs["input_ids"][0]
    image = (tokens == backbone.image_token_id).nonzero()[:, 0]
    begin = int(image[0])
    device = backbone.device
    return Layout(
        size=size,
        prefix=tokens[:begin].to(device),
        body=tokens[begin:].to(device),
        image_at=(image - begin).to(device),
        positions=backbone.positions(inputs, answer_length).to(device),
    )


def record_prefix(backbone: Backbone, layout: Layout) -> Prefix | None:
    """Keys and values of the prompt's text prefix; None if the image comes first. Differentiable."""
    length = len(layout.prefix)
    if length == 0:
        return None
    cache = RecordingCache()
    rows = arrange(backbone.attention, torch.tensor([length]), length, 0, backbone.device)
    backbone.hidden(backbone.embed(layout.prefix)[None], layout.span(0, length), rows, cache)
    return cache.prefix


class _Choice:
    """A level of the grammar as the decode loop reads it."""

    def __init__(self, level: Level, backbone: Backbone) -> None:
        tokens = level.tokens[:, None]
        head = backbone.plain_head
        self._rows = None if head is None else head.weight[level.tokens]
        """[U, D] of the head."""
        self._head, self._tokens = backbone.head, level.tokens
        self.forbidden = ~level.allowed
        """bool[S, U]"""
        self.tokens = torch.cat((tokens, level.forced.expand(len(tokens), -1)), 1)
        """int64[U, 1 + R]: a choice and what it forces."""
        self.embeddings = backbone.embed(self.tokens)
        self.gain, self.next_state = level.gain, level.next_state

    def scores(self, hidden: Tensor) -> Tensor:
        """float32[B, U]: the logits of the tokens for hidden states [B, D]."""
        if self._rows is None:
            return self._head(hidden)[:, self._tokens].float()
        return F.linear(hidden, self._rows).float()


class Decoder:
    """Decodes frames of one layout with one set of weights.

    The prefix's keys and values are computed once. A call then costs the vision tower, one forward over
    [image, end of prompt, what every answer opens with], and one forward per choice but the last; forced
    tokens ride along with the choice before them. Of a plain head only the rows that a choice allows are
    used. Nothing is read back by the host.
    """

    @torch.no_grad()
    def __init__(self, backbone: Backbone, layout: Layout, grammar: ActionGrammar) -> None:
        device = backbone.device
        self._layout = layout
        self._choices = [_Choice(level.to(device), backbone) for level in grammar.levels]
        self._opening = grammar.opening.to(device)
        self._action_dim = grammar.action_dim
        self._capacity = layout.prompt_length + grammar.max_length
        self._decoder = ServingDecoder(backbone, layout.positions)
        self._body = backbone.embed(torch.cat((layout.body, self._opening)))[None]
        self._prefix = self._decoder.cache(1, len(layout.prefix))
        if len(layout.prefix):
            self._decoder(backbone.embed(layout.prefix)[None], self._prefix)
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
        batch = len(image.tokens)
        cache.length = self._prefix.length
        body = self._body.expand(batch, -1, -1)
        hidden = self._decoder(body, cache, image_at=self._layout.image_at, image=image)
        state = torch.zeros(batch, dtype=torch.int64, device=hidden.device)
        action = torch.zeros(batch, self._action_dim, dtype=torch.float32, device=hidden.device)
        answer = [self._opening.expand(batch, -1)]
        for i, choice in enumerate(self._choices):
            scores = choice.scores(hidden)
            if noise is not None:
                scores = scores / temperature + noise[:, i, : scores.shape[1]]
            chosen = scores.masked_fill_(choice.forbidden.index_select(0, state), -torch.inf).argmax(1)
            action += choice.gain[state, chosen]
            state = choice.next_state[state, chosen]
            answer.append(choice.tokens.index_select(0, chosen))
            if i + 1 < len(self._choices):
                hidden = self._decoder(choice.embeddings.index_select(0, chosen), cache)
        return action, torch.cat(answer, 1)

    def new_cache(self, batch: int) -> KeyValueCache:
        """A cache for this batch size, its prefix in place."""
        return self._decoder.cache(batch, self._capacity, self._prefix)

    def _cache(self, batch: int) -> KeyValueCache:
        """Of this batch size. Two are kept: for full and last batches."""
        if batch not in self._caches:
            if len(self._caches) == 2:
                del self._caches[next(iter(self._caches))]
            self._caches[batch] = self.new_cache(batch)
        return self._caches[batch]
