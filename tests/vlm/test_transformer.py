"""The language model that decodes: its parts and layers against the formulas of transformers' modules."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from covr_fast.vlm.decode.projection import projection
from covr_fast.vlm.decode.transformer import Attention, Heads, Layer, LayerCache, Norm, attend


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class RmsNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.variance_epsilon = 1e-6

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


class LayerModule(nn.Module):
    """A layer with the names that transformers gives its parts."""

    def __init__(self, heads: Heads, width=40, middle=70, bias=True, head_norms=False, activation=None):
        super().__init__()
        queries, kv = heads.kv * heads.groups * heads.dim, heads.kv * heads.dim
        self.input_layernorm, self.post_attention_layernorm = RmsNorm(width), RmsNorm(width)
        self.self_attn = attention = nn.Module()
        for name, outputs in (("q_proj", queries), ("k_proj", kv), ("v_proj", kv)):
            setattr(attention, name, nn.Linear(width, outputs, bias=bias))
        attention.o_proj = nn.Linear(queries, width, bias=bias)
        if head_norms:
            attention.q_norm, attention.k_norm = RmsNorm(heads.dim), RmsNorm(heads.dim)
        self.mlp = mlp = nn.Module()
        mlp.gate_proj, mlp.up_proj = (nn.Linear(width, middle, bias=bias) for _ in range(2))
        mlp.down_proj = nn.Linear(middle, width, bias=bias)
        mlp.act_fn = activation or nn.SiLU()

    def forward(self, x, heads: Heads, cos, sin):
        """All positions at once, by the formulas."""
        attention, mlp = self.self_attn, self.mlp
        normed = self.input_layernorm(x)
        q, k, v = (
            project(normed).unflatten(-1, (-1, heads.dim)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        half = heads.dim // 2
        q, k = (y * cos + torch.cat((-y[..., half:], y[..., :half]), -1) * sin for y in (q, k))
        k, v = (y.repeat_interleave(heads.groups, 1) for y in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=heads.scale)
        x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
        normed = self.post_attention_layernorm(x)
        return x + mlp.down_proj(mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed))


# ---- norm and product ----


@pytest.mark.parametrize("width", [1, 15, 16, 64, 193])
def test_norm(width):
    module, x = RmsNorm(width), torch.randn(3, 5, width)
    got = Norm(module)(x).double()
    torch.testing.assert_close(got, module.double()(x.double()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 140])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 31), (50, 33), (40, 200)])
def test_product(rows, inputs, outputs, bias):
    layer, x = nn.Linear(inputs, outputs, bias=bias), torch.randn(rows, inputs)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    product = projection(layer)
    for same in (x, x.t().contiguous().t()):  # in another order in memory
        torch.testing.assert_close(product(same).double(), expected, atol=1e-5, rtol=1e-5)
    # Into the middle of a larger tensor: what lies around it stays.
    around = torch.full((rows + 2, outputs), 7.0)
    product.add_to(around[1:-1], x)
    torch.testing.assert_close(around[1:-1].double(), expected + 7, atol=1e-5, rtol=1e-5)
    assert (around[[0, -1]] == 7).all()


@pytest.mark.parametrize("bias", [True, False])
def test_projections_of_one_input_are_one_product(bias):
    first, second = nn.Linear(12, 5, bias=bias), nn.Linear(12, 9, bias=False)
    x = torch.randn(4, 12)
    torch.testing.assert_close(projection(first, second)(x), torch.cat((first(x), second(x)), -1).detach())


# ---- a layer ----


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("kv", "groups", "dim"), [(2, 1, 32), (1, 3, 16), (2, 2, 48)])
@pytest.mark.parametrize("prefix", [0, 1, 21])
@pytest.mark.parametrize("activation", [nn.SiLU, nn.GELU])
@torch.no_grad()
def test_decoding(prefix, kv, groups, dim, batch, activation):
    """A prefix, a prompt and steps of one and more positions, against all positions at once in float64."""
    heads = Heads(kv, groups, dim, dim**-0.5)
    module = LayerModule(heads, bias=kv == 2, head_norms=groups == 2, activation=activation())
    steps = [*([prefix] if prefix else []), 9, 1, 2, 6]
    skips = [*([0] if prefix else []), 0, 0, 1, 5]
    total = sum(steps)
    angles = torch.rand(total, dim // 2).repeat(1, 2) * 6
    layer, attention = Layer(module), Attention(heads, angles.cos(), angles.sin())
    cache = LayerCache(*(torch.zeros(batch, kv, total, dim) for _ in range(2)))
    x = torch.randn(batch, total, 40) * 2
    expected = module.double()(x.double(), heads, angles.double().cos(), angles.double().sin())
    module.float()
    past = 0
    for count, skip in zip(steps, skips, strict=True):
        new = slice(past, past + count)
        got = layer(x[:, new].contiguous(), attention, cache, past, skip)
        torch.testing.assert_close(got.double(), expected[:, new][:, skip:], atol=5e-5, rtol=1e-4)
        past += count


def test_an_input_may_be_overwritten_but_not_around_it():
    heads = Heads(1, 1, 16, 0.25)
    angles = torch.rand(2, 8).repeat(1, 2)
    layer, attention = Layer(LayerModule(heads)), Attention(heads, angles.cos(), angles.sin())
    cache = LayerCache(torch.full((1, 1, 4, 16), 7.0), torch.full((1, 1, 4, 16), 7.0))
    around = torch.full((3, 2, 40), 7.0)
    with torch.no_grad():
        layer(around[1:2], attention, cache, 0, 0)
    assert (around[[0, 2]] == 7).all()
    assert all((x[:, :, 2:] == 7).all() for x in cache)


def test_attention_of_any_memory_order(monkeypatch):
    """Some of CUDA's kernels give [B, heads, n, dim] in the memory order [B, n, heads, dim]."""
    heads = Heads(2, 2, 16, 0.25)
    q, keys, values = (torch.randn(3, h, n, 16) for h, n in ((4, 5), (2, 7), (2, 7)))
    expected = attend(heads, q, keys, values, None)
    plain = F.scaled_dot_product_attention

    def reordered(*args, **options):
        return plain(*args, **options).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", reordered)
    torch.testing.assert_close(attend(heads, q, keys, values, None), expected)
