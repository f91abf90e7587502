"""The tokens of one number of an answer as a tree of choices."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NumberTree:
    """The `G` values of a number, each with the tokens that spell it.

    No value's tokens begin those of another. So a path from the root leads to each value, and the value's
    probability is the product of those of its steps. The root, node 0, comes after the tokens that all values
    begin with. Of the other nodes only those are kept that have a choice or lead to one: steps from any other
    have probability 1.
    """

    shared: list[int]
    """The tokens that all values begin with."""
    lengths: Tensor
    """int64[G]: tokens of each value, `shared` included."""
    tokens: Tensor
    """int64[N]: the token that leads to each node; 0 for the root, to which many lead."""
    depth: Tensor
    """int64[N]: steps from the root."""
    parents: list[int]
    """The node before each, which has a smaller number; -1 for the root."""
    allowed: Tensor
    """bool[N, U]: which of the grammar's `number_tokens` may follow each node."""
    paths: Tensor
    """int64[S, G]: the steps to each value, as places in a flat [N, U]; N * U after the last one."""


def number_tree(words: Sequence[Sequence[int]], choices: Sequence[int]) -> NumberTree:
    """The tree of `words`, two or more sequences of tokens of which none begins another. `choices` [U] holds
    all tokens in them, ascending."""
    common = 0
    while len({word[common] for word in words}) == 1:
        common += 1
    children: list[dict[int, int]] = [{}]
    parents, tokens, depth = [-1], [0], [0]
    routes: list[list[tuple[int, int]]] = []
    """Per word the steps from the root: a node and the token that follows."""
    for word in words:
        node, route = 0, []
        for token in word[common:]:
            route.append((node, token))
            if token not in children[node]:
                children[node][token] = len(children)
                children.append({})
                parents.append(node)
                tokens.append(token)
                depth.append(depth[node] + 1)
            node = children[node][token]
        routes.append(route)

    kept = {0}
    for node, following in enumerate(children):
        at = node
        while len(following) > 1 and at not in kept:
            kept.add(at)
            at = parents[at]
    nodes = sorted(kept)
    place = {node: n for n, node in enumerate(nodes)}
    column = {token: u for u, token in enumerate(choices)}
    allowed = torch.zeros(len(nodes), len(choices), dtype=torch.bool)
    for node in nodes:
        allowed[place[node], [column[token] for token in children[node]]] = True
    steps = [
        [place[at] * len(choices) + column[token] for at, token in route if at in kept] for route in routes
    ]
    longest = max(map(len, steps))
    return NumberTree(
        shared=list(words[0][:common]),
        lengths=torch.tensor([len(word) for word in words]),
        tokens=torch.tensor([tokens[node] for node in nodes]),
        depth=torch.tensor([depth[node] for node in nodes]),
        parents=[-1, *(place[parents[node]] for node in nodes[1:])],
        allowed=allowed,
        paths=torch.tensor([path + [allowed.numel()] * (longest - len(path)) for path in steps]).t(),
    )
