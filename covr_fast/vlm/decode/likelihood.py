"""How likely answers are. The grammar makes an answer one of finitely many, so this is exact."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.backbones import ImageFeatures
from .decoder import Decoder
from .numbers import entropy


@dataclass(eq=False)
class ActionDistribution:
    """What the VLM thinks of one number of its answers to a batch of frames."""

    values: Tensor
    """float32[G], ascending: all values of the number."""
    log_prob: Tensor
    """float32[B, G]: the log-probability of each value, in nats."""

    @property
    def mean(self) -> Tensor:
        """float32[B]"""
        return (self.log_prob.exp() * self.values).sum(1)

    @property
    def mode(self) -> Tensor:
        """float32[B]: the likeliest value. A greedy answer takes the likeliest token each time, and may have
        another value."""
        return self.values[self.log_prob.argmax(1)]

    @property
    def entropy(self) -> Tensor:
        """float32[B], in nats: 0 for one sure value, log G where all are alike."""
        return entropy(self.log_prob)

    def __len__(self) -> int:
        return len(self.log_prob)


@torch.no_grad()
def answer_log_prob(decoder: Decoder, image: ImageFeatures, answers: Tensor) -> Tensor:
    """float32[B], in nats: the log-probabilities of answers int64[B, L], which `ActionGrammar.encode` made.

    One forward over the image, the end of the prompt and the answers. Each token has its share of the softmax
    over the tokens that the grammar allows after the earlier ones. So a forced token has probability 1.
    """
    weights, grammar = decoder.weights, decoder.weights.grammar
    opening, choices = len(weights.opening), weights.choices
    # Shorter answers end in padding, which no earlier token sees.
    width = opening + sum(choice.tokens.shape[1] for choice in choices[:-1])
    answers = F.pad(answers, (0, grammar.max_length - answers.shape[1]), value=grammar.pad_token_id)
    cache = decoder.new_cache(len(answers))
    hidden = decoder.prefill(cache, image, answers[:, opening:width])
    state = torch.zeros(len(answers), dtype=torch.int64, device=answers.device)
    total = torch.zeros(len(answers), dtype=torch.float32, device=answers.device)
    at = 0  # tokens after the opening
    for choice in choices:
        scores = choice.scores(hidden[:, at]).masked_fill_(choice.forbidden[state], -torch.inf)
        chosen = torch.searchsorted(choice.columns, answers[:, opening + at].contiguous())
        total += scores.log_softmax(1).gather(1, chosen[:, None])[:, 0]
        state = choice.next_state[state, chosen]
        at += choice.tokens.shape[1]
    return total


@torch.no_grad()
def number_log_prob(
    decoder: Decoder, image: ImageFeatures, answers: Tensor, places: Tensor, *, slot: int
) -> Tensor:
    """float32[B, G], in nats: the log-probabilities of the values of number `slot`, given those before it.

    One forward over the image, the end of the prompt and the answers, then that of `NumberReader`.

    Args:
        answers: int64[B, L], of which the numbers from `slot` on do not matter.
        places: int64[B, slot], the numbers before, as places on the grid.
    """
    cache = decoder.new_cache(len(answers))
    opening = len(decoder.weights.opening)
    decoder.prefill(cache, image, answers[:, opening:] if slot else None)
    return decoder.numbers(cache, [slot], answers, places)[0]
