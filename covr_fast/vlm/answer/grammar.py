"""The answer's grammar as a token automaton, derived from the tokenizer.

The language is `Action: [a_1, ..., a_A]` plus the end-of-turn token, each a_i on the grid of `prompt.spell`.
Only the tokenizer's own way of writing each answer is accepted, so an action has exactly one token sequence
and what generation can produce is what fine-tuning trains. Tokens may hold several digits, signs or
punctuation: nothing is assumed but that the tokens of a number do not depend on the other numbers, which is
checked over the whole grid when the grammar is built.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .prompt import CLOSING, JOINER, OPENING, answer_format, grid_size, spell


@dataclass(frozen=True)
class Level:
    """One choice of the decoder, made for the whole batch at once.

    `S` counts the automaton states that a row may be in here, `U` the tokens that any of them allows.
    States are numbered anew at every level. A row whose state allows a single token simply gets it.
    """

    tokens: Tensor
    """int64[U], ascending."""
    allowed: Tensor
    """bool[S, U]: which of `tokens` may follow in each state."""
    next_state: Tensor
    """int64[S, U]: the state at the next level, with `forced` already taken."""
    gain: Tensor
    """float32[S, U, A]: the numbers completed by this choice and `forced`, 0 elsewhere. Summed over levels
    these are the action."""
    forced: Tensor
    """int64[R]: tokens that must follow whatever was chosen; they need no forward of their own."""

    def to(self, device: torch.device) -> "Level":
        return Level(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


class ActionGrammar:
    """What the VLM may answer, in tokens.

    Args:
        tokenizer: a transformers tokenizer with an end-of-sequence token.
        context: the text right before the answer (the prompt's end), for tokenizers that write a word
            differently depending on what precedes it.
        action_dim: numbers in an action.
        decimals: digits after the point, 1 to 4.

    Raises:
        TypeError: `action_dim` or `decimals` is no integer.
        ValueError: an argument out of range, or a tokenizer that cannot spell the answers (no end token,
            or the tokens of one number depend on another number).
    """

    def __init__(self, tokenizer: Any, context: str, *, action_dim: int, decimals: int) -> None:
        action_dim, decimals = answer_format(action_dim, decimals)
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token, so answers could not end; set one")
        self.action_dim = action_dim
        self.decimals = decimals
        self.eos_token_id: int = tokenizer.eos_token_id
        pad = tokenizer.pad_token_id
        self.pad_token_id: int = self.eos_token_id if pad is None else pad
        self._tokenizer = tokenizer
        self._context = context
        self._spell_out()
        self._check_independence()
        self._build_automaton()
        self.opening, self.levels = self._schedule()
        self.max_length = len(self.opening) + sum(1 + len(level.forced) for level in self.levels)

    # ------------------------------------------------------------------ actions <-> tokens

    def steps(self, actions: Tensor) -> Tensor:
        """Grid steps int64[N, A] of float actions [N, A], clipped to [-1, 1], halves to even."""
        return (actions.double().clamp(-1, 1) * 10**self.decimals).round().long()

    def encode(self, actions: Tensor) -> Tensor:
        """The answers' tokens int64[N, L], end-of-turn included, padded at the right with `pad_token_id`.

        Args:
            actions: float[N, A]; each number is clipped to [-1, 1] and rounded to the grid.
        """
        columns = (self.steps(actions) + 10**self.decimals).tolist()
        rows = [
            [token for slot, index in enumerate(row) for token in self._slots[min(slot, 1)][index]]
            + self._ending
            for row in columns
        ]
        out = torch.full((len(rows), max(map(len, rows), default=0)), self.pad_token_id, dtype=torch.int64)
        for i, row in enumerate(rows):
            out[i, : len(row)] = torch.tensor(row)
        return out

    def lengths(self, actions: Tensor) -> Tensor:
        """Tokens int64[N] of each answer of `encode(actions)`."""
        index = self.steps(actions).cpu() + 10**self.decimals
        counts = [torch.tensor([len(tokens) for tokens in slot]) for slot in self._slots]
        total = counts[0][index[:, 0]] + len(self._ending)
        return total + sum(counts[1][index[:, slot]] for slot in range(1, self.action_dim))

    def allowed(self, answer: list[int]) -> list[int]:
        """The tokens that may follow the answer's beginning `answer`; only the pad token after its end."""
        state = self._root
        for token in answer:
            state = self._edges[state][token]
        return sorted(self._edges[state])

    def actions(self, answers: Tensor) -> Tensor:
        """The numbers float32[N, A] that complete answers [N, L] spell, found by walking the automaton."""
        out = torch.zeros(len(answers), self.action_dim, dtype=torch.float32)
        for i, row in enumerate(answers.tolist()):
            state = self._root
            for token in row:
                if (state, token) in self._numbers:
                    slot, value = self._numbers[state, token]
                    out[i, slot] = value
                state = self._edges[state][token]
        return out.to(answers.device)

    def decode(self, tokens: list[int]) -> str:
        """The answer's text, end-of-turn and padding removed."""
        if self.eos_token_id in tokens:
            tokens = tokens[: tokens.index(self.eos_token_id)]
        return self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ).strip()

    # ------------------------------------------------------------------ construction

    def _tokens_of(self, texts: list[str]) -> list[list[int]]:
        ids = self._tokenizer([self._context + text for text in texts], add_special_tokens=False)["input_ids"]
        return [list(row) for row in ids]

    def _continuations(self, before: str, texts: list[str]) -> list[list[int]]:
        """The tokens that each of `texts` adds after the answer's beginning `before`."""
        base, *full = self._tokens_of([before, *(before + text for text in texts)])
        for text, tokens in zip(texts, full, strict=True):
            if tokens[: len(base)] != base or len(tokens) == len(base):
                raise self._cannot_spell(f"{text!r} after {before!r} is merged into what precedes it")
        return [tokens[len(base) :] for tokens in full]

    def _spell_out(self) -> None:
        """Tokens of every grid value in the first and in a later position, and of the answer's end."""
        half = grid_size(self.decimals) // 2
        words = [spell(step, self.decimals) for step in range(-half, half + 1)]
        first = OPENING + words[half]
        self._words = words
        self._slots = (
            self._continuations("", [OPENING + word for word in words]),
            self._continuations(first, [JOINER + word for word in words]),
        )
        closing = self._continuations(first, [CLOSING])[0]
        self._ending = [*closing, self.eos_token_id]

    def _check_independence(self) -> None:
        """Every value in every kind of position, next to unlike neighbours, is written as `_slots` says."""
        size = len(self._words)
        dim = min(self.action_dim, 3)
        # Neighbours far apart on the grid: other sign, other digits.
        rows = [[(i + k * (size // 3 + 1)) % size for k in range(dim)] for i in range(size)]
        texts = [OPENING + JOINER.join(self._words[i] for i in row) + CLOSING for row in rows]
        context = self._tokens_of([""])[0]
        for text, row, tokens in zip(texts, rows, self._tokens_of(texts), strict=True):
            expected = [token for slot, i in enumerate(row) for token in self._slots[min(slot, 1)][i]]
            if tokens != context + expected + self._ending[:-1]:
                raise self._cannot_spell(f"the tokens of {text!r} are not those of its parts")
            if (
                self._tokenizer.decode(expected, clean_up_tokenization_spaces=False).strip()
                != text[: -len(CLOSING)]
            ):
                raise self._cannot_spell(f"{text!r} does not survive encoding and decoding")

    def _cannot_spell(self, reason: str) -> ValueError:
        return ValueError(
            f"this tokenizer ({type(self._tokenizer).__name__}) cannot spell the answer grammar: {reason}"
        )

    def _build_automaton(self) -> None:
        """A trie per number, each leaf of one being the root of the next.

        `_edges[state]` maps a token to the next state; `_numbers[state, token]` is the (slot, value) that an
        edge completes. A finished row stays in the state `_done` and goes on emitting the pad token.
        """
        self._edges: list[dict[int, int]] = [{self.pad_token_id: 0}]
        self._numbers: dict[tuple[int, int], tuple[int, float]] = {}
        self._done = following = 0
        for token in reversed(self._ending):
            following = self._new_state({token: following})
        for slot in reversed(range(self.action_dim)):
            root = self._new_state({})
            for step, tokens in enumerate(self._slots[min(slot, 1)], -(10**self.decimals)):
                state = root
                for token in tokens[:-1]:
                    state = self._edges[state].setdefault(token, len(self._edges))
                    if state == len(self._edges):
                        self._new_state({})
                if tokens[-1] in self._edges[state] or state == following:
                    raise self._cannot_spell("the tokens of one number begin those of another")
                self._edges[state][tokens[-1]] = following
                self._numbers[state, tokens[-1]] = (slot, step / 10**self.decimals)
            following = root
        self._root = following

    def _new_state(self, edges: dict[int, int]) -> int:
        self._edges.append(edges)
        return len(self._edges) - 1

    def _schedule(self) -> tuple[Tensor, list[Level]]:
        """Walks the automaton breadth first: the tokens that every answer opens with, then choices, each with
        the run of forced tokens after it. All rows take one token per depth, so none waits for another."""
        frontier, opening, _ = self._follow_forced([self._root])
        levels: list[Level] = []
        while frontier != [self._done]:
            states = frontier
            tokens = sorted({token for state in states for token in self._edges[state]})
            column = {token: u for u, token in enumerate(tokens)}
            reached = list(dict.fromkeys(to for state in states for to in self._edges[state].values()))
            ends, forced, completed = self._follow_forced(reached)
            frontier = list(dict.fromkeys(ends))
            row = {state: s for s, state in enumerate(frontier)}
            arrival = {start: i for i, start in enumerate(reached)}

            allowed = np.zeros((len(states), len(tokens)), bool)
            next_state = np.zeros(allowed.shape, np.int64)
            gain = np.zeros((*allowed.shape, self.action_dim), np.float32)
            for s, state in enumerate(states):
                for token, to in self._edges[state].items():
                    u, i = column[token], arrival[to]
                    allowed[s, u] = True
                    next_state[s, u] = row[ends[i]]
                    number = self._numbers.get((state, token))
                    for slot, value in completed[i] if number is None else [number, *completed[i]]:
                        gain[s, u, slot] = value
            parts = (np.array(tokens), allowed, next_state, gain, np.array(forced, np.int64))
            levels.append(Level(*map(torch.from_numpy, parts)))
        return torch.tensor(opening, dtype=torch.int64), levels

    def _follow_forced(self, states: list[int]) -> tuple[list[int], list[int], list[list[tuple[int, float]]]]:
        """Follows the tokens that are the only choice in all of `states` at once.

        Returns where each state ends, the tokens, and the numbers completed on the way from each.
        """
        at = list(states)
        forced: list[int] = []
        completed: list[list[tuple[int, float]]] = [[] for _ in states]
        while any(state != self._done for state in at):
            choices = {token for state in at for token in self._edges[state]}
            if len(choices) > 1:
                break
            (token,) = choices
            for i, state in enumerate(at):
                if (state, token) in self._numbers:
                    completed[i].append(self._numbers[state, token])
                at[i] = self._edges[state][token]
            forced.append(token)
        return at, forced, completed
