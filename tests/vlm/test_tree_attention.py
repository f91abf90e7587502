"""Tokens in a tree: each path from the root is what it would be as a line."""

import pytest
import torch
from test_transformer import LayerModule

from covr_fast.vlm.decode.transformer import Attention, Heads, Layer, LayerCache
from covr_fast.vlm.decode.tree_attention import TreeAttention


@pytest.mark.parametrize(("kv", "groups", "dim"), [(2, 1, 32), (1, 3, 16)])
@torch.no_grad()
def test_every_path_of_a_tree_is_a_line(kv, groups, dim):
    """Nodes after a context whose length differs by row, against each path from the root alone."""
    torch.manual_seed(0)
    heads = Heads(kv, groups, dim, dim**-0.5)
    angles = torch.rand(20, dim // 2).repeat(1, 2) * 6
    layer, attention = Layer(LayerModule(heads)), Attention(heads, angles.cos(), angles.sin())
    paths, used = [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4], [0, 2, 5]], torch.tensor([7, 12])
    context, nodes = torch.randn(2, 12, 40), torch.randn(2, 6, 40)
    cache = LayerCache(*(torch.full((2, kv, 20, dim), 3.0) for _ in range(2)))
    layer(context.clone(), attention, cache, 0, 0)
    filled = [x.clone() for x in cache]

    sees = torch.zeros(6, 6, dtype=torch.bool)
    for node, path in enumerate(paths):
        sees[node, path] = True
    depth = torch.tensor([len(path) - 1 for path in paths])
    before = (torch.arange(12) < used[:, None, None]).expand(2, 6, 12)
    visible = torch.cat((before, sees.expand(2, 6, 6)), 2)
    tree = TreeAttention(attention, used[:, None] + depth, visible)
    got = layer(nodes.clone(), tree, cache, 12, 0)
    assert all(map(torch.equal, cache, filled)), "a tree writes nothing"

    for row in range(2):
        for node, path in enumerate(paths):
            own = LayerCache(*(x[row : row + 1].clone() for x in cache))
            line = layer(nodes[row : row + 1, path].contiguous(), attention, own, int(used[row]), 0)
            torch.testing.assert_close(got[row, node], line[0, -1], atol=1e-5, rtol=1e-5)
