"""What serving runs in C++ on the CPU, against the same formulas as torch operations."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from covr_fast.ops._backend import launch
from covr_fast.vlm.attend import CppAttention, Heads, SegmentAttention, TorchAttention
from covr_fast.vlm.layers import GatedMlp, Norm, Projection


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class RmsNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.variance_epsilon = 1e-6


@pytest.mark.parametrize("width", [1, 15, 16, 64, 193])
def test_norm(width):
    module, x = RmsNorm(width), torch.randn(3, 5, width)
    expected = F.rms_norm(x.double(), (width,), module.weight.double(), module.variance_epsilon)
    torch.testing.assert_close(Norm(module)(x).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [1, 17, 96])
def test_gate(width):
    gate_up = torch.randn(7, 2 * width) * torch.tensor([0.01, 1, 10, 50, 100, 200, 1000])[:, None]
    out = torch.full((7, width), torch.nan)
    launch("silu_gate", out, gate_up, 7, width, 1)
    gate, up = gate_up.double().chunk(2, -1)
    torch.testing.assert_close(out.double(), F.silu(gate) * up, atol=1e-6, rtol=1e-5)


def test_gated_mlp_adds_to_its_residual():
    mlp = nn.Module()
    mlp.gate_proj, mlp.up_proj = nn.Linear(24, 40, bias=False), nn.Linear(24, 40, bias=False)
    mlp.down_proj, mlp.act_fn = nn.Linear(40, 24), nn.SiLU()
    x, y = torch.randn(2, 3, 24), torch.randn(2, 3, 24)
    expected = x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))
    with torch.no_grad():
        GatedMlp(mlp).add_to(x, y)
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


def test_projections_of_one_input_are_one_product():
    first, second = nn.Linear(12, 5), nn.Linear(12, 9)
    x = torch.randn(4, 12)
    with torch.no_grad():
        together = Projection(first, second)(x)
        torch.testing.assert_close(together, torch.cat((first(x), second(x)), -1))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize(("kv", "groups", "dim"), [(2, 1, 32), (1, 3, 16), (2, 2, 48)])
@pytest.mark.parametrize("prefix", [0, 1, 16, 21])
def test_attention(prefix, kv, groups, dim, batch, threads):
    """A prefix, a prompt and steps of one and two positions, as decoding makes them."""
    heads = Heads(kv, groups, dim, dim**-0.5)
    steps = [9, 1, 2, 6]
    total = prefix + sum(steps)
    angles = torch.rand(total, dim // 2).repeat(1, 2) * 6
    like, width = torch.zeros(()), (groups + 2) * kv * dim
    torch.set_num_threads(threads)
    caches = []
    for kind in (TorchAttention, CppAttention):
        attend = kind(heads, angles.cos(), angles.sin())
        caches.append((attend, attend.hold(1, prefix, like, None, 0)))
    if prefix:
        qkv = torch.randn(1, prefix, width)
        expected, got = (attend(qkv, held, 0, 0) for attend, held in caches)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    caches = [(attend, attend.hold(batch, total, like, held, prefix)) for attend, held in caches]
    begin = prefix
    for count, first in zip(steps, (0, 0, 1, 5), strict=True):
        qkv = torch.randn(batch, count, width) * 2
        expected, got = (attend(qkv, held, begin, first) for attend, held in caches)
        torch.testing.assert_close(got, expected, atol=5e-5, rtol=1e-4)
        begin += count


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("segment", [1, 5, 16, 33, 64])
@pytest.mark.parametrize(("heads", "dim"), [(3, 16), (2, 32), (2, 48), (1, 80)])
def test_segment_attention(heads, dim, segment, segments):
    """Positions see all of their segment, and each segment of an image has its own angles."""
    batch, count = 2, segment * segments
    angles = torch.rand(count, dim // 2).repeat(1, 2) * 6
    qkv = torch.randn(batch, count, 3 * heads * dim) * 2
    attend = SegmentAttention(heads, dim, dim**-0.5, angles.cos(), angles.sin())
    got = attend(qkv, segment)
    torch.set_num_threads(3)
    assert torch.equal(attend(qkv, segment), got)
    q, k, v = qkv.double().view(batch, count, 3, heads, dim).permute(2, 0, 3, 1, 4)
    q, k = (
        x * angles.cos() + torch.cat((-x[..., dim // 2 :], x[..., : dim // 2]), -1) * angles.sin()
        for x in (q, k)
    )
    apart = torch.arange(count) // segment
    seen = apart[:, None] == apart
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=1e-4)
