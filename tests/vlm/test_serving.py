"""What serving runs in C++ on the CPU, against the same formulas as torch operations."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from covr_fast import _C
from covr_fast.vlm.decode.attend import Heads, signed
from covr_fast.vlm.decode.cpp_layers import CppLayer, CppLayers, cpp_layer, cpp_layers
from covr_fast.vlm.decode.layers import GatedMlp, LayerModules, Norm, Projection
from covr_fast.vlm.decode.torch_layers import TorchLayers


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=[16, 8, 4])
def lanes(request):
    """The code for machines with AVX-512, with AVX2 and with neither, as far as this one can run it."""
    best = _C.lanes_in_use()
    if request.param > best:
        pytest.skip(f"this machine's vectors have {best} lanes")
    _C.use_lanes(request.param)
    yield
    _C.use_lanes(best)


def test_lanes_that_no_machine_has():
    with pytest.raises(ValueError, match="lanes must be 4, 8 or 16 and at most"):
        _C.use_lanes(5)


class RmsNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.variance_epsilon = 1e-6

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


class Mlp(nn.Module):
    def __init__(self, width, middle, bias=False, activation=None):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, middle, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(middle, width, bias=bias)
        self.act_fn = activation or nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def make_modules(heads: Heads, width=40, middle=70, bias=True, head_norms=False) -> LayerModules:
    """Sizes that fill neither vectors nor panels of weights."""
    queries, kv = heads.queries * heads.dim, heads.kv * heads.dim
    return LayerModules(
        input_norm=RmsNorm(width),
        qkv=tuple(nn.Linear(width, n, bias=bias) for n in (queries, kv, kv)),
        out=nn.Linear(queries, width, bias=bias),
        mlp_norm=RmsNorm(width),
        mlp=Mlp(width, middle, bias),
        head_norms=(RmsNorm(heads.dim), RmsNorm(heads.dim)) if head_norms else None,
    )


def make_angles(positions, dim):
    angles = torch.rand(positions, dim // 2).repeat(1, 2) * 6
    return angles.cos(), angles.sin()


# ---------------------------------------------------------------------- norm, product, MLP


@pytest.mark.parametrize("width", [1, 15, 16, 64, 193])
def test_norm(width, lanes):
    module, x = RmsNorm(width), torch.randn(3, 5, width)
    torch.testing.assert_close(Norm(module)(x).double(), module.double()(x.double()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 11, 12, 13, 16, 23, 24, 25, 140])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 31), (16, 32), (50, 33), (17, 64), (40, 200)])
def test_product(rows, inputs, outputs, threads, lanes):
    """Rows and outputs that fill tiles and panels, and that do not."""
    torch.set_num_threads(threads)
    layer, x = nn.Linear(inputs, outputs), torch.randn(rows, inputs)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    product = Projection(layer)
    got = product(x)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    # Into the middle of a larger tensor: what lies around it stays.
    around = torch.full((rows + 2, outputs), 7.0)
    product.add_to(around[1:-1], x)
    torch.testing.assert_close(around[1:-1].double(), expected + 7, atol=1e-5, rtol=1e-5)
    assert (around[[0, -1]] == 7).all()


def test_product_of_unordered_input():
    layer, x = nn.Linear(6, 9), torch.randn(6, 4).t()
    torch.testing.assert_close(Projection(layer)(x), layer(x).detach())


def test_product_of_nothing():
    assert Projection(nn.Linear(6, 9))(torch.randn(2, 0, 6)).shape == (2, 0, 9)


def test_projections_of_one_input_are_one_product():
    first, second = nn.Linear(12, 5, bias=False), nn.Linear(12, 9, bias=False)
    x = torch.randn(4, 12)
    torch.testing.assert_close(Projection(first, second)(x), torch.cat((first(x), second(x)), -1).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gated_mlp_adds_to_its_residual(dtype):
    mlp = Mlp(24, 40, activation=nn.GELU()).to(dtype)
    x, y = torch.randn(2, 2, 3, 24, dtype=dtype)
    expected = x + mlp(y)
    with torch.no_grad():
        GatedMlp(mlp).add_to(x, y)
    torch.testing.assert_close(x, expected.detach(), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- a language model's layers


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch", [3, 40])
@pytest.mark.parametrize(("kv", "groups", "dim"), [(2, 1, 32), (1, 3, 16), (2, 2, 48)])
@pytest.mark.parametrize("prefix", [0, 1, 21])
def test_decoding(prefix, kv, groups, dim, batch, threads, lanes):
    """A prefix, a prompt and steps of one and two positions; the largest batch goes through in pieces."""
    heads = Heads(kv, groups, dim, dim**-0.5)
    modules = [make_modules(heads, bias=kv == 2, head_norms=groups == 2)]
    steps = [9, 1, 2, 6]
    total = prefix + sum(steps)
    like, width = torch.zeros(()), modules[0].out.out_features
    torch.set_num_threads(threads)
    cos, sin = make_angles(total, dim)
    fused = cpp_layers(modules, heads, cos, sin)
    assert isinstance(fused, CppLayers)
    both = [TorchLayers(modules, heads, cos, sin), fused]

    @torch.no_grad()
    def run(caches, rows, count, begin, first):
        x = torch.randn(rows, count, width) * 2
        expected, got = (
            layers(0, x.clone(), held, begin, first) for layers, held in zip(both, caches, strict=True)
        )
        torch.testing.assert_close(got, expected, atol=5e-5, rtol=1e-4)

    shared = [layers.hold(1, prefix, like, None, 0) for layers in both]
    if prefix:
        run(shared, 1, prefix, 0, 0)
    caches = [
        layers.hold(batch, total, like, held, prefix) for layers, held in zip(both, shared, strict=True)
    ]
    begin = prefix
    for count, first in zip(steps, (0, 0, 1, 5), strict=True):
        run(caches, batch, count, begin, first)
        begin += count


# ---------------------------------------------------------------------- a vision tower's layers


def by_torch(modules: LayerModules, heads: Heads, x, cos, sin, segment):
    """The layer in float64."""
    modules = LayerModules(*(part.double() if isinstance(part, nn.Module) else part for part in modules))
    batch, count, _ = x.shape
    qkv = modules.qkv[0].double()(modules.input_norm(x))
    q, k, v = qkv.view(batch, count, 3, heads.kv, heads.dim).permute(2, 0, 3, 1, 4)
    half = heads.dim // 2
    q, k = (y * cos + torch.cat((-y[..., half:], y[..., :half]), -1) * sin for y in (q, k))
    apart = torch.arange(count) // segment
    seen = apart[:, None] == apart
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=heads.scale)
    x = x + modules.out(attended.transpose(1, 2).flatten(2))
    return (x + modules.mlp(modules.mlp_norm(x))).detach()


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("segment", [1, 5, 16, 33, 64])
@pytest.mark.parametrize(("n", "dim"), [(3, 16), (2, 32), (2, 48), (1, 80)])
def test_encoding(n, dim, segment, segments, lanes):
    """Positions see all of their segment, and each segment of an image has its own angles."""
    batch, count = 5, segment * segments
    heads = Heads(n, 1, dim, dim**-0.5)
    modules = make_modules(heads)._replace(qkv=(nn.Linear(40, 3 * n * dim),))
    cos, sin = make_angles(count, dim)
    layer = cpp_layer(modules, heads)
    assert isinstance(layer, CppLayer)
    x = torch.randn(batch, count, 40) * 2
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(x.clone())
        layer.encode(results[-1], segment, cos, signed(sin))
    assert torch.equal(*results)
    expected = by_torch(modules, heads, x.double(), cos.double(), sin.double(), segment)
    torch.testing.assert_close(results[0].double(), expected, atol=5e-5, rtol=1e-4)


def test_gates_far_from_zero():
    """From where the sigmoid is 0 to where it is 1."""
    heads = Heads(1, 1, 16, 0.25)
    modules = make_modules(heads)._replace(qkv=(nn.Linear(40, 48),))
    with torch.no_grad():
        modules.mlp.gate_proj.weight *= 10.0 ** torch.linspace(-3, 3, 70)[:, None]
    cos, sin = make_angles(8, 16)
    x = torch.randn(4, 8, 40)
    got = x.clone()
    cpp_layer(modules, heads).encode(got, 8, cos, signed(sin))
    expected = by_torch(modules, heads, x.double(), cos.double(), sin.double(), 8)
    torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=1e-4)


# ---------------------------------------------------------------------- what C++ does not have


class _Quantized(nn.Linear):
    """Not a plain linear layer, as those of bitsandbytes."""


@pytest.mark.parametrize("case", ["dtype", "quantized", "activation", "heads"])
def test_layers_that_cpp_does_not_have(case):
    heads = Heads(1, 1, 16, 0.25) if case != "heads" else Heads(1, 1, 8, 0.25)
    modules = make_modules(heads)
    if case == "dtype":
        modules = make_modules(heads)._replace(mlp_norm=RmsNorm(40).double())
    elif case == "quantized":
        modules = modules._replace(out=_Quantized(16, 40))
    elif case == "activation":
        modules = modules._replace(mlp=Mlp(40, 70, activation=nn.GELU()))
    assert cpp_layer(modules, heads) is None
    assert cpp_layers([make_modules(heads), modules], heads, *make_angles(4, heads.dim)) is None
