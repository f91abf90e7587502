"""The grammar of answers as an automaton over tokens, derived from the tokenizer.

An answer is `Action: [a_1, ..., a_A]` and the end-of-turn token, each a_i a value on the grid of
`prompt.spell`. Only the token sequence with which the tokenizer writes an answer is accepted. So every action
has exactly one token sequence, and generation produces the same sequences that fine-tuning trains. A token
may contain several digits, signs or punctuation. The one assumption, that the tokens of a number do not
depend on the other numbers, is checked over the whole grid when the grammar is built.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .prompt import CLOSING, JOINER, OPENING, answer_format, spell
from .tree import NumberTree, number_tree


@dataclass(frozen=True)
class Level:
    """One choice of the decoder, made for the whole batch at once.

    `S` is the number of automaton states that a row may be in here, `U` that of the tokens that any of them
    allows. Each level numbers its states from 0. A row whose state allows a single token gets that token.
    """

    tokens: Tensor
    """int64[U], ascending."""
    allowed: Tensor
    """bool[S, U]: which of `tokens` may follow in each state."""
    next_state: Tensor
    """int64[S, U]: the state at the next level, after the token and `forced`."""
    gain: Tensor
    """float32[S, U, A]: the numbers that this choice and `forced` complete, 0 elsewhere. The sum over all
    levels is the action."""
    forced: Tensor
    """int64[R]: the tokens that follow every choice. They need no forward pass."""

    def to(self, device: torch.device) -> "Level":
        return Level(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


class ActionGrammar:
    """The answers that the VLM may give, as tokens.

    Args:
        tokenizer: a transformers tokenizer with an end-of-sequence token.
        context: the text directly before the answer (the end of the prompt), because a tokenizer may write
            a word differently after different texts.
        action_dim: numbers in an action.
        decimals: digits after the point, 1 to 4.
        leading: text before "Action" in every answer, because the model was trained with it there.
        end: the token that ends an answer. None: the tokenizer's end of sequence.

    Raises:
        ValueError: the tokenizer cannot spell the answers (no end token, or the tokens of one number depend
            on another number). Else see `prompt.answer_format`.
    """

    def __init__(
        self,
        tokenizer: Any,
        context: str,
        *,
        action_dim: int,
        decimals: int,
        leading: str = "",
        end: int | None = None,
    ) -> None:
        action_dim, decimals = answer_format(action_dim, decimals)
        end = tokenizer.eos_token_id if end is None else end
        if end is None:
            raise ValueError("the tokenizer has no eos_token, so answers could not end; set one")
        self.action_dim = action_dim
        self.decimals = decimals
        self.eos_token_id: int = end
        """The token that ends an answer."""
        pad = tokenizer.pad_token_id
        self.pad_token_id: int = self.eos_token_id if pad is None else pad
        self._tokenizer = tokenizer
        self._context = context
        self._leading = leading
        self._opening = leading + OPENING
        half = 10**decimals
        words = [spell(step, decimals) for step in range(-half, half + 1)]
        self._spell_out(words)
        self._check_independence(words)
        self._build_automaton()
        self.opening, self.levels = self._schedule()
        self.max_length = len(self.opening) + sum(1 + len(level.forced) for level in self.levels)

    # ---- actions <-> tokens ----

    def encode(self, actions: Tensor) -> Tensor:
        """The answers' tokens int64[N, L], end-of-turn included, padded at the right with `pad_token_id`.

        Args:
            actions: float[N, A]; each number is clipped to [-1, 1] and rounded to the grid, halves to even.
        """
        places = self.places(actions).tolist()
        rows = [torch.tensor(self._number_tokens(row) + self._ending) for row in places]
        return pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)

    def places(self, actions: Tensor) -> Tensor:
        """The places int64[N, A] of numbers float[N, A] on the grid, as `encode` rounds them."""
        scale = 10**self.decimals
        places: Tensor = (actions.double().clamp(-1, 1) * float(scale)).round().long() + scale
        return places

    @cached_property
    def grid(self) -> Tensor:
        """float32[G], ascending: the values that a number may have."""
        scale = 10**self.decimals
        steps = torch.arange(-scale, scale + 1, dtype=torch.float64)
        return steps.div(scale).float()

    @cached_property
    def number_tokens(self) -> Tensor:
        """int64[U], ascending: the tokens of all numbers, and of the text that they are joined with."""
        return torch.tensor(sorted({token for words in self._slots for word in words for token in word}))

    @cached_property
    def trees(self) -> list[NumberTree]:
        """The tokens of each number as a tree. Those of the first number begin with the opening."""
        choices = self.number_tokens.tolist()
        trees = [number_tree(words, choices) for words in self._slots[:2]]
        return [trees[min(slot, 1)] for slot in range(self.action_dim)]

    def allowed(self, answer: list[int]) -> list[int]:
        """The tokens that may follow `answer`, the beginning of one; after its end only the pad token."""
        state = self._root
        for token in answer:
            state = self._edges[state][token]
        return sorted(self._edges[state])

    def actions(self, answers: Tensor) -> Tensor:
        """The numbers float32[N, A] in complete answers [N, L], by following the automaton."""
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
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.removeprefix(self._leading).strip()

    # ---- construction ----

    def _tokens_of(self, texts: list[str]) -> list[list[int]]:
        ids = self._tokenizer([self._context + text for text in texts], add_special_tokens=False)["input_ids"]
        return [list(row) for row in ids]

    def _continuations(self, before: str, texts: list[str]) -> list[list[int]]:
        """The tokens that each of `texts` adds to `before`, the beginning of an answer."""
        base, *full = self._tokens_of([before, *(before + text for text in texts)])
        for text, tokens in zip(texts, full, strict=True):
            if tokens[: len(base)] != base or len(tokens) == len(base):
                raise self._cannot_spell(f"{text!r} after {before!r} is merged into what precedes it")
        return [tokens[len(base) :] for tokens in full]

    def _spell_out(self, words: list[str]) -> None:
        """Tokens of every grid value in every position (`_slots`), and of the end of an answer."""
        first = self._opening + words[len(words) // 2]
        opening = self._continuations("", [self._opening + word for word in words])
        joined = self._continuations(first, [JOINER + word for word in words])
        self._slots = [opening, *[joined] * (self.action_dim - 1)]
        self._ending = [*self._continuations(first, [CLOSING])[0], self.eos_token_id]

    def _number_tokens(self, row: list[int]) -> list[int]:
        """Tokens of an answer up to its last number, for the places of its numbers on the grid."""
        return [token for slot, i in zip(self._slots, row, strict=False) for token in slot[i]]

    def _check_independence(self, words: list[str]) -> None:
        """Checks that every value in every position has the tokens of `_slots`, whatever its neighbours."""
        size = len(words)
        dim = min(self.action_dim, 3)
        # Neighbours are far apart on the grid: they differ in sign and digits.
        rows = [[(i + k * (size // 3 + 1)) % size for k in range(dim)] for i in range(size)]
        texts = [self._opening + JOINER.join(words[i] for i in row) + CLOSING for row in rows]
        context = self._tokens_of([""])[0]
        for text, row, tokens in zip(texts, rows, self._tokens_of(texts), strict=True):
            expected = self._number_tokens(row)
            if tokens != context + expected + self._ending[:-1]:
                raise self._cannot_spell(f"the tokens of {text!r} are not those of its parts")
            decoded = self._tokenizer.decode(expected, clean_up_tokenization_spaces=False)
            if decoded.strip() != text.removesuffix(CLOSING).strip():
                raise self._cannot_spell(f"{text!r} does not survive encoding and decoding")

    def _cannot_spell(self, reason: str) -> ValueError:
        return ValueError(
            f"this tokenizer ({type(self._tokenizer).__name__}) cannot spell the answer grammar: {reason}"
        )

    def _build_automaton(self) -> None:
        """One trie per number; the leaves of a trie are the root of the next.

        `_edges[state]` maps a token to the next state; `_numbers[state, token]` is the (slot, value) that
        this edge completes. A finished row stays in the state `_done`, where only the pad token follows.
        """
        self._edges: list[dict[int, int]] = [{self.pad_token_id: 0}]
        self._numbers: dict[tuple[int, int], tuple[int, float]] = {}
        self._done = following = 0
        for token in reversed(self._ending):
            following = self._new_state({token: following})
        for slot in reversed(range(self.action_dim)):
            root = self._new_state({})
            for step, tokens in enumerate(self._slots[slot], -(10**self.decimals)):
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
        """The tokens that every answer begins with, and the choices, each with the forced tokens after it.

        The automaton is walked breadth first: all rows take one token per depth, so no row waits for another.
        """
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
        """Follows tokens as long as all of `states` allow one and the same token only.

        Returns the last state from each of `states`, the tokens, and the numbers completed from each.
        """
        at = list(states)
        forced: list[int] = []
        completed: list[list[tuple[int, float]]] = [[] for _ in states]
        while any(state != self._done for state in at):
            token, *others = {token for state in at for token in self._edges[state]}
            if others:
                break
            for i, state in enumerate(at):
                if (state, token) in self._numbers:
                    completed[i].append(self._numbers[state, token])
                at[i] = self._edges[state][token]
            forced.append(token)
        return at, forced, completed
