import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from covr_fast.ops import exploration_filter, exploration_filter_padded

ENTROPY = 0.7


def numpy_filter(returns: np.ndarray, entropy: float) -> tuple[np.ndarray, float, float, float, float]:
    """The definition, z-scores and all, in float64."""
    g = returns.astype(np.float64)
    mean, std = g.mean(), g.std()
    if std == 0:
        return np.empty(0, np.int64), 0.0, mean, mean, 0.0
    z = (g - mean) / std
    low, median, high = np.percentile(z, [25, 50, 75])
    tau = median + (high - low) / (1 + math.exp(entropy))
    return np.flatnonzero(z > tau), tau, mean + std * tau, mean, std


def check(result, returns: torch.Tensor, entropy: float = ENTROPY) -> None:
    indices, tau, cutoff, mean, std = numpy_filter(returns.double().numpy(), entropy)
    assert result.indices.dtype == torch.int64
    assert result.indices.tolist() == indices.tolist()
    scale = max(abs(mean), std, 1e-30)
    assert result.mean == pytest.approx(mean, rel=1e-12, abs=1e-13 * scale)
    assert result.std == pytest.approx(std, rel=1e-7, abs=1e-13 * scale)
    assert result.cutoff == pytest.approx(cutoff, rel=1e-12, abs=1e-12 * scale)
    assert result.tau == pytest.approx(tau, rel=1e-7, abs=1e-7)


def cases() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(10_007, generator=generator)
    return {
        "normal": normal,
        "two": torch.tensor([3.0, -1.0]),
        "three": torch.tensor([3.0, -1.0, 0.5]),
        "five": torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0]),
        "ties": torch.randint(0, 4, (5003,), generator=generator).float() + 0.1,
        "two_values": (torch.arange(2001) % 7 == 0).float(),
        "heavy_tail": normal.sign() * normal.abs().mul(8).exp(),
        "huge_offset": normal * 0.01 + 3000.0,
        "signed_zeros": torch.tensor([0.0, -0.0, 0.0, -0.0, 1.0, -1.0, 2.0]),
        "denormal": normal * 1e-42,
        "outlier_first": torch.cat([torch.tensor([1e6]), normal]),
        "large": torch.randn(300_001, generator=generator) * 30 + 500,
        "large_ties": torch.randint(0, 50, (300_000,), generator=generator).float(),
        "extremes": torch.tensor([3e38, -3e38, 1.0, 2.0, 3.0, 2.5]),
    }


@pytest.mark.parametrize("name", cases())
def test_against_numpy(name, backend):
    returns = cases()[name]
    check(exploration_filter(returns, ENTROPY, backend=backend), returns)


@given(
    values=st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=60),
    entropy=st.floats(-8, 8),
)
def test_any_values(backend, values, entropy):
    returns = torch.tensor(values)
    result = exploration_filter(returns, entropy, backend=backend)
    # The cutoff is compared with, not the z-scores: rounding of z may tie or untie a value near it.
    exact = np.percentile(returns.double().numpy(), [25, 50, 75])
    cutoff = exact[1] + (exact[2] - exact[0]) / (1 + math.exp(entropy))
    spread = np.ptp(returns.double().numpy())
    assert result.cutoff == pytest.approx(cutoff, rel=1e-12, abs=1e-12 * spread)
    expected = (returns.double() > result.cutoff).nonzero().squeeze(1) if spread else torch.empty(0)
    assert result.indices.tolist() == expected.tolist()
    if spread:
        unscaled = result.mean + result.std * result.tau
        assert result.cutoff == pytest.approx(unscaled, rel=1e-6, abs=1e-6 * spread)


@given(seed=st.integers(0, 2**20), count=st.integers(1, 3000), spread=st.sampled_from([1e-6, 1.0, 1e6]))
def test_backends_agree_exactly(seed, count, spread):
    returns = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * spread + 10
    reference = exploration_filter(returns, ENTROPY, backend="reference")
    kernel = exploration_filter(returns, ENTROPY, backend="cpp")
    assert torch.equal(kernel.indices, reference.indices)
    assert kernel.cutoff == pytest.approx(reference.cutoff, rel=1e-14)


@pytest.mark.parametrize("count, value", [(1, 4.2), (2, 0.1), (1000, 0.1), (300_000, -7.3)])
def test_no_spread_keeps_nothing(count, value, backend):
    returns = torch.full((count,), value)
    result = exploration_filter(returns, ENTROPY, backend=backend)
    assert result.indices.numel() == 0
    assert result.std == 0
    assert result.tau == 0
    assert result.mean == result.cutoff == pytest.approx(returns[0].item())


def test_strictly_above(backend):
    # Entropy far below zero: sigmoid(-H) = 1, cutoff = median + IQR = 3 + 2 exactly.
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    result = exploration_filter(returns, -100.0, backend=backend)
    assert result.cutoff == 5.0
    assert result.indices.numel() == 0


def test_threshold_follows_entropy_in_the_described_direction(backend):
    returns = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    early, late = (exploration_filter(returns, h, backend=backend) for h in (3.0, -3.0))
    assert early.tau < late.tau
    assert early.indices.numel() > late.indices.numel()
    printed = exploration_filter(returns, 3.0, threshold="equation", backend=backend)
    assert printed.tau == pytest.approx(late.tau)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 700])
def test_non_finite_is_an_error(bad, position, backend):
    returns = torch.randn(1000)
    returns[position] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        exploration_filter(returns, ENTROPY, backend=backend)
    padded = exploration_filter_padded(returns, ENTROPY, backend=backend)
    assert padded.kept == -1
    assert (padded.indices == -1).all()
    assert padded.tau.isnan()


@pytest.mark.parametrize("name", ["normal", "two", "ties", "large"])
def test_padded_form_holds_the_same(name, backend):
    returns = cases()[name]
    plain = exploration_filter(returns, ENTROPY, backend=backend)
    padded = exploration_filter_padded(returns, ENTROPY, backend=backend)
    count = int(padded.kept)
    assert torch.equal(padded.indices[:count], plain.indices)
    assert (padded.indices[count:] == -1).all()
    assert [float(x) for x in padded[2:]] == list(plain[1:])


@pytest.mark.parametrize("threshold", ["described", "equation"])
def test_an_entropy_in_a_tensor_is_the_number(threshold, backend):
    returns, entropy = cases()["normal"], torch.tensor(ENTROPY)
    options = {"threshold": threshold, "backend": backend}
    for function in (exploration_filter, exploration_filter_padded):
        number, tensor = (function(returns, e, **options) for e in (float(entropy), entropy))
        assert torch.equal(number.indices, tensor.indices)
        assert number[1:] == tensor[1:]


def test_threads_do_not_change_a_bit():
    returns = cases()["large"]
    results = []
    for threads in (1, 3):  # tests/conftest.py sets the number back
        torch.set_num_threads(threads)
        results.append(exploration_filter(returns, ENTROPY, backend="cpp"))
    assert torch.equal(results[0].indices, results[1].indices)
    assert results[0][1:] == results[1][1:]


@pytest.mark.slow
def test_more_than_torch_quantile_takes():
    returns = torch.randn(2**24 + 1, generator=torch.Generator().manual_seed(0)).add_(10)
    check(exploration_filter(returns, ENTROPY, backend="cpp"), returns)


def test_other_dtypes_and_strides():
    returns = torch.randn(400, generator=torch.Generator().manual_seed(2))
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        check(exploration_filter(returns.to(dtype), ENTROPY), returns.to(dtype))
    check(exploration_filter(returns[::3], ENTROPY, backend="cpp"), returns[::3])


@pytest.mark.parametrize(
    "returns, keywords, message",
    [
        (torch.empty(0), {}, "returns are empty"),
        (torch.ones(2, 2), {}, r"returns must be floating \[M\]"),
        (torch.ones(3, dtype=torch.int64), {}, "returns must be floating"),
        (torch.ones(3), {"entropy": math.nan}, "entropy must be finite"),
        (torch.ones(3), {"entropy": torch.tensor(math.nan)}, "entropy must be finite"),
        (
            torch.ones(3),
            {"entropy": torch.ones(1)},
            r"entropy must be a number or .*32 \[1\]",
        ),
        (torch.ones(3), {"entropy": torch.tensor(1)}, "entropy must be a number or a floating scalar"),
        (torch.ones(3), {"entropy": torch.ones((), device="meta")}, "entropy is on meta but returns is on"),
        (torch.ones(3), {"threshold": "printed"}, "threshold must be"),
    ],
)
def test_errors_name_the_argument(returns, keywords, message):
    for function in (exploration_filter, exploration_filter_padded):
        with pytest.raises(ValueError, match=message):
            function(returns, **{"entropy": ENTROPY, **keywords})


def test_operator_checks():
    returns = torch.randn(100)
    torch.library.opcheck(torch.ops.covr_fast.exploration_filter.default, (returns, 0.3))
    scale = torch.tensor(0.3, dtype=torch.float64)
    torch.library.opcheck(torch.ops.covr_fast.exploration_filter_padded.default, (returns, scale))


def test_padded_form_compiles_into_one_graph():
    returns = torch.randn(100)
    compiled = torch.compile(
        lambda x: exploration_filter_padded(x * 2, ENTROPY), fullgraph=True, backend="aot_eager"
    )
    result, expected = compiled(returns), exploration_filter_padded(returns * 2, ENTROPY)
    torch.testing.assert_close(tuple(result), tuple(expected), rtol=0, atol=0)


def test_an_entropy_in_a_tensor_is_traced_and_not_read():
    returns, entropy = torch.randn(100), torch.tensor(ENTROPY)
    compiled = torch.compile(
        lambda x, e: exploration_filter_padded(x, e * 2), fullgraph=True, backend="aot_eager"
    )
    result, expected = compiled(returns, entropy), exploration_filter_padded(returns, entropy * 2)
    torch.testing.assert_close(tuple(result), tuple(expected))
    for infinite in (math.nan, math.inf, -math.inf):
        assert compiled(returns, torch.tensor(infinite)).kept == -1


@torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True)
def test_plain_form_compiles_where_scalars_are_captured():
    returns = torch.randn(100)
    compiled = torch.compile(
        lambda x: exploration_filter(x * 2, ENTROPY), fullgraph=True, backend="aot_eager"
    )
    result, expected = compiled(returns), exploration_filter(returns * 2, ENTROPY)
    assert torch.equal(result.indices, expected.indices)
    assert result.cutoff == pytest.approx(expected.cutoff)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("name", cases())
def test_cuda(name):
    returns = cases()[name]
    result = exploration_filter(returns.cuda(), ENTROPY, backend="cuda")
    check(result._replace(indices=result.indices.cpu()), returns)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_cuda_non_finite(bad):
    returns = torch.randn(5000, device="cuda")
    returns[4321] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        exploration_filter(returns, ENTROPY, backend="cuda")
    assert exploration_filter_padded(returns, ENTROPY, backend="cuda").kept == -1


@pytest.mark.needs_cuda
@pytest.mark.parametrize("count", [5000, 50_000])  # one kernel, and several
def test_cuda_entropy_stays_on_the_device(count):
    returns = torch.randn(count)
    values, entropy = returns.cuda(), torch.tensor(ENTROPY, device="cuda")
    infinite = torch.tensor(math.inf, device="cuda")
    exploration_filter_padded(values, entropy, backend="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = exploration_filter_padded(values, entropy, backend="cuda")
        bad = exploration_filter_padded(values, infinite, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = exploration_filter(returns, float(entropy), backend="cpp")
    assert result.indices[: int(result.kept)].tolist() == expected.indices.tolist()
    assert float(result.cutoff) == pytest.approx(expected.cutoff, rel=1e-12)
    assert bad.kept == -1
    assert (bad.indices == -1).all()
    assert bad.tau.isnan()


@pytest.mark.needs_cuda
def test_cuda_padded_form_in_a_graph_follows_new_values():
    returns = torch.randn(5000, device="cuda")
    exploration_filter_padded(returns, ENTROPY, backend="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = exploration_filter_padded(returns, ENTROPY, backend="cuda")
    for seed in range(3):
        values = torch.randn(5000, generator=torch.Generator().manual_seed(seed)) * (seed + 1)
        returns.copy_(values)
        graph.replay()
        expected = exploration_filter(values, ENTROPY, backend="cpp")
        assert captured.indices[: int(captured.kept)].tolist() == expected.indices.tolist()
        assert float(captured.cutoff) == pytest.approx(expected.cutoff)
