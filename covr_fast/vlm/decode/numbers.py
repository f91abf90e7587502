"""What the VLM thinks of the numbers in an answer: their exact distributions over the grid."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..answer.grammar import ActionGrammar
from ..answer.tree import NumberTree
from ..model.backbones import Backbone
from .head import TokenScores
from .transformer import Attention, KeyValueCache, LayerCache, Transformer
from .tree_attention import TreeAttention

MOST_NODES = 256
"""Nodes of one forward. Each has a row and a column of the mask, so its memory grows with their square."""
MOST_POSITIONS = 8192
"""Rows times positions of one forward. By the shapes of Qwen2.5-VL-3B this is 0.9 GB in bfloat16, cache not
included."""


class _Part(NamedTuple):
    """Nodes of one forward. With each node there are those that lead to it."""

    tokens: Tensor
    """int64[n]"""
    slots: Tensor
    """int64[n]: the place of each node's number in `NumberReader.slots`."""
    depth: Tensor
    """int64[n]: steps from the root."""
    sees: Tensor
    """bool[n, n]: a node sees the nodes that lead to it, and itself."""
    read: Tensor
    """int64[m]: the nodes of this forward that are read. The others are only seen."""
    nodes: Tensor
    """int64[m]: the same nodes among those of all trees."""


class NumberReader:
    """The distributions of some of an answer's numbers, each given the numbers before it.

    The tree of each number (see `NumberTree`) hangs from the place where its first choice is made, in an
    answer whose keys and values are in a cache. One forward runs all nodes of all trees (more, if there are
    more than `MOST_NODES`, or more rows than fit). A node sees the prompt, the answer before the root, and
    the nodes that lead to it. The root is a token of the answer, or the prompt's last one. It is run again,
    so of the answer's own forward nothing but the cache has to be kept. The host reads nothing back.

    Args:
        slots: which numbers, from 0.
    """

    @torch.no_grad()
    def __init__(
        self, backbone: Backbone, grammar: ActionGrammar, transformer: Transformer, slots: Sequence[int]
    ) -> None:
        device = backbone.device
        trees = [grammar.trees[slot] for slot in slots]
        self._embed = backbone.embed
        self._transformer = transformer
        self._scores = TokenScores(backbone, grammar.number_tokens.to(device))
        self._slots = torch.tensor(slots, device=device)
        self._shared = torch.tensor([len(tree.shared) for tree in trees], device=device)
        self._lengths = torch.stack([tree.lengths for tree in grammar.trees], 1).to(device)
        """int64[G, A]: tokens of each value of each number."""
        self._forbidden = ~torch.cat([tree.allowed for tree in trees]).to(device)
        """bool[N, U], of the nodes of all trees."""
        sizes = torch.tensor([0, *(tree.allowed.numel() for tree in trees)])
        self._paths = [
            torch.where(tree.paths < own, tree.paths + before, int(sizes.sum())).to(device)
            for tree, own, before in zip(trees, sizes[1:], sizes.cumsum(0), strict=False)
        ]
        """Per number int64[S, G], the steps to each value in the flat [N, U], which one 0 follows."""
        self._parts = [_Part(*(x.to(device) for x in part)) for part in _parts(trees)]

    def __call__(
        self, cache: KeyValueCache, attention: Attention, begin: int, text: Tensor, places: Tensor
    ) -> list[Tensor]:
        """float32[B, G] for each number: the log-probabilities of its values, in nats.

        Args:
            cache: keys and values of the prompt and of the answers, up to the roots at least. It may have
                more than B rows.
            attention: for the positions of prompt and answer.
            begin: the position of an answer's first token.
            text: int64[B, 1 + L], the last token of the prompt and the answers.
            places: int64[B, A], the answers' numbers, as places on the grid. Those from the last of `slots`
                on do not matter, and may be missing.
        """
        lengths = self._lengths[:, : places.shape[1]].gather(0, places)
        ends = F.pad(lengths.cumsum(1), (1, 0))  # in column k: the tokens before number k
        roots = ends[:, self._slots] + self._shared - 1  # places in the answer, -1 is the end of the prompt
        tokens = text.gather(1, roots + 1)
        steps = torch.zeros(len(text), *self._forbidden.shape, dtype=torch.float32, device=text.device)
        for part in self._parts:
            forbidden = self._forbidden[part.nodes]
            for rows in batches(len(text), len(part.tokens)):
                layers = [LayerCache(keys[rows], values[rows]) for keys, values in cache.layers]
                own = KeyValueCache(layers, cache.length)
                hidden = self._hidden(part, own, attention, roots[rows] + begin, tokens[rows])
                scores = self._scores(hidden[:, part.read]).masked_fill_(forbidden, -torch.inf)
                steps[rows].index_copy_(1, part.nodes, scores.log_softmax(-1))
        flat = F.pad(steps.flatten(1), (0, 1))
        return [torch.stack([flat[:, step] for step in path]).sum(0) for path in self._paths]

    def _hidden(
        self, part: _Part, cache: KeyValueCache, attention: Attention, roots: Tensor, tokens: Tensor
    ) -> Tensor:
        """[B, n, D] of a part's nodes; `roots` and their `tokens` are int64[B, slots]."""
        root = roots[:, part.slots]
        before = torch.arange(cache.length, device=root.device) < root[..., None]
        visible = torch.cat((before, part.sees.expand(len(root), -1, -1)), 2)
        tree = TreeAttention(attention, root + part.depth, visible)
        x = self._embed(torch.where(part.depth == 0, tokens[:, part.slots], part.tokens))
        return self._transformer(x, tree, cache, outputs=len(part.tokens))


def entropy(log_prob: Tensor) -> Tensor:
    """float32[B], in nats, of distributions float32[B, G] of log-probabilities."""
    return -(log_prob.exp() * log_prob).sum(1)


def batches(rows: int, positions: int) -> Iterator[slice]:
    """Parts of a batch of so many rows of so many positions."""
    size = max(1, MOST_POSITIONS // positions)
    return (slice(begin, min(begin + size, rows)) for begin in range(0, rows, size))


def _parts(trees: Sequence[NumberTree]) -> Iterator[_Part]:
    """The nodes of these trees, in as many parts as `MOST_NODES` asks for."""
    tokens, depth = (torch.cat([getattr(tree, name) for tree in trees]) for name in ("tokens", "depth"))
    slots = torch.repeat_interleave(torch.tensor([len(tree.tokens) for tree in trees]))
    parents: list[int] = []
    for tree in trees:
        first = len(parents)
        parents += [-1, *(first + parent for parent in tree.parents[1:])]
    lines: list[list[int]] = []
    """For each node the nodes that lead to it, and itself."""
    for node, parent in enumerate(parents):
        lines.append([*(lines[parent] if parent >= 0 else ()), node])

    begin = 0
    while begin < len(lines):
        here: list[int] = []
        end = begin
        while end < len(lines):
            new = [node for node in lines[end] if node not in here]
            if here and len(here) + len(new) > MOST_NODES:
                break
            here += new
            end += 1
        place = {node: n for n, node in enumerate(here)}
        sees = torch.zeros(len(here), len(here), dtype=torch.bool)
        for node in here:
            sees[place[node], [place[other] for other in lines[node]]] = True
        read = torch.tensor([place[node] for node in range(begin, end)])
        nodes, at = torch.arange(begin, end), torch.tensor(here)
        yield _Part(tokens[at], slots[at], depth[at], sees, read, nodes)
        begin = end
