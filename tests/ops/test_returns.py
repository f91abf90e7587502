import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from covr_fast.ops import discounted_returns


def truth(
    rewards: torch.Tensor,
    ends: torch.Tensor,
    gamma: float,
    horizon: int | None = None,
    bootstrap: torch.Tensor | None = None,
) -> np.ndarray:
    """float64, written as the definition is: each episode's sum on its own."""
    r, e = rewards.double().numpy(), ends.numpy()
    v = np.zeros_like(r) if bootstrap is None else bootstrap.double().numpy()
    steps, columns = r.shape
    g = np.zeros_like(r)
    for n in range(columns):
        for t in range(steps):
            for k in range(min(steps - t, horizon or steps)):
                g[t, n] += gamma**k * r[t + k, n]
                if e[t + k, n] or t + k == steps - 1:
                    g[t, n] += gamma ** (k + 1) * v[t + k, n]
                    break
    return g


def ragged(steps: int, columns: int, rate: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(steps, columns, generator=generator)
    return rewards, torch.rand(steps, columns, generator=generator) < rate


def test_worked_example(backend):
    rewards = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    ends = torch.tensor([[False], [True], [False], [False]])
    expected = torch.tensor([[2.0], [2.0], [8.0], [8.0]])
    torch.testing.assert_close(discounted_returns(rewards, ends, 0.5, backend=backend), expected)


@given(
    steps=st.integers(1, 40),
    columns=st.integers(1, 20),
    rate=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    seed=st.integers(0, 2**20),
)
def test_against_the_definition(backend, steps, columns, rate, gamma, seed):
    rewards, ends = ragged(steps, columns, rate, seed)
    result = discounted_returns(rewards, ends, gamma, backend=backend)
    np.testing.assert_allclose(result.numpy(), truth(rewards, ends, gamma), rtol=1e-5, atol=2e-5)


def test_worked_example_of_horizon_and_bootstrap(backend):
    rewards = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]])
    ends = torch.tensor([[False], [False], [True], [False], [False]])
    values = torch.tensor(
        [[torch.nan], [torch.nan], [32.0], [torch.nan], [64.0]]
    )  # read at 2 and at the last

    def returns(**options) -> list[float]:
        return discounted_returns(rewards, ends, 0.5, **options, backend=backend)[:, 0].tolist()

    assert returns(horizon=2) == [2.0, 4.0, 4.0, 16.0, 16.0]
    assert returns(bootstrap=values) == [7.0, 12.0, 20.0, 32.0, 48.0]
    assert returns(horizon=2, bootstrap=values) == [2.0, 12.0, 20.0, 32.0, 48.0]  # 0 does not reach the end
    assert returns(horizon=1) == rewards[:, 0].tolist()


@given(
    steps=st.integers(1, 40),
    columns=st.integers(1, 20),
    rate=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    horizon=st.one_of(st.none(), st.integers(1, 50)),
    seed=st.integers(0, 2**20),
)
def test_horizon_and_bootstrap_against_the_definition(backend, steps, columns, rate, gamma, horizon, seed):
    rewards, ends = ragged(steps, columns, rate, seed)
    values = torch.randn(steps, columns, generator=torch.Generator().manual_seed(seed + 1))
    expected = truth(rewards, ends, gamma, horizon, values)
    result = discounted_returns(rewards, ends, gamma, horizon=horizon, bootstrap=values, backend=backend)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=2e-5)
    wide = discounted_returns(
        rewards.double(), ends, gamma, horizon=horizon, bootstrap=values.double(), backend=backend
    )
    np.testing.assert_allclose(wide.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5000, 1), (1000, 3), (70, 900), (0, 3), (3, 0)])
@pytest.mark.parametrize("horizon", [1, 2, 30, 10_000])
def test_a_horizon_gives_the_bits_of_the_reference_on_any_number_of_threads(shape, horizon):
    rewards, ends = ragged(*shape, 0.01)
    expected = discounted_returns(rewards, ends, 0.98, horizon=horizon, backend="reference")
    for threads in (1, 3):
        torch.set_num_threads(threads)  # tests/conftest.py sets the number back
        assert torch.equal(discounted_returns(rewards, ends, 0.98, horizon=horizon, backend="cpp"), expected)


def test_error_over_a_horizon_is_not_larger_than_that_of_float32_sums():
    rewards, ends = ragged(20_000, 1, 0.01)
    exact = truth(rewards, ends, 0.99, 50)
    result = discounted_returns(rewards, ends, 0.99, horizon=50)
    total = torch.zeros_like(rewards)
    alive = torch.ones_like(ends)
    for k in range(50):
        steps = len(rewards) - k
        total[:steps] += torch.where(alive[:steps], 0.99**k * rewards[k:], 0)
        alive[:steps] &= ~ends[k:]
    error, plain = (np.abs(values.numpy() - exact).max() for values in (result, total))
    assert error <= plain


def test_a_horizon_beyond_all_episodes_changes_nothing():
    rewards, ends = ragged(2000, 2, 0.1)
    whole = discounted_returns(rewards, ends, 0.9)
    endless = discounted_returns(rewards, ends, 0.9, horizon=2**62)
    torch.testing.assert_close(endless, whole)


@pytest.mark.parametrize("shape", [(200_000, 1), (50_000, 5), (300, 700), (0, 3), (3, 0), (70_000, 17)])
@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_error_is_not_larger_than_that_of_the_torch_loop(shape, rate):
    rewards, ends = ragged(*shape, rate)
    short = shape[0] <= 1000  # the torch loop takes 10 us per step
    exact = discounted_returns(rewards.double(), ends, 0.99, backend="reference" if short else "cpp")
    result = discounted_returns(rewards, ends, 0.99, backend="cpp")
    if not rewards.numel():
        assert result.shape == shape
        return
    error = (result - exact).abs().max()
    if short:
        loop = discounted_returns(rewards, ends, 0.99, backend="reference")
        assert error <= 1.1 * (loop - exact).abs().max() + 1e-6
    assert error < 5e-5  # of returns up to 40


def test_threads_do_not_change_a_bit():
    for shape in ((300_000, 1), (3000, 100)):
        rewards, ends = ragged(*shape, 0.001)
        torch.set_num_threads(1)
        one = discounted_returns(rewards, ends, 0.99)
        torch.set_num_threads(3)  # tests/conftest.py sets the number back
        assert torch.equal(one, discounted_returns(rewards, ends, 0.99))


@pytest.mark.parametrize("columns", [1, 20])
def test_nan_does_not_leak_into_the_episode_before(backend, columns):
    rewards, ends = torch.ones(4, columns), torch.zeros(4, columns, dtype=torch.bool)
    rewards[2], ends[1] = torch.nan, True
    result = discounted_returns(rewards, ends, 0.9, backend=backend)
    assert result[:2].isfinite().all()
    assert result[2].isnan().all()


@pytest.mark.parametrize("columns", [1, 20])
def test_nan_does_not_leak_over_a_horizon(backend, columns):
    rewards, ends = torch.ones(6, columns), torch.zeros(6, columns, dtype=torch.bool)
    rewards[4], ends[1] = torch.nan, True
    result = discounted_returns(rewards, ends, 0.9, horizon=2, backend=backend)
    assert result[[0, 1, 2, 5]].isfinite().all()
    assert result[[3, 4]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype):
    rewards, ends = ragged(50, 3, 0.1)
    rewards = rewards.to(dtype)
    expected = discounted_returns(rewards.float(), ends, 0.9).to(dtype)
    assert torch.equal(discounted_returns(rewards, ends, 0.9), expected)


def test_non_contiguous_input():
    rewards, ends = ragged(30, 12, 0.1)
    expected = discounted_returns(rewards.T.contiguous(), ends.T.contiguous(), 0.9)
    assert torch.equal(discounted_returns(rewards.T, ends.T, 0.9), expected)


def test_gradient_is_the_adjoint():
    rewards, ends = ragged(9, 4, 0.3)
    rewards = rewards.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda r: discounted_returns(r, ends, 0.9, backend="cpp"), (rewards,))


@pytest.mark.parametrize("horizon", [None, 3])
def test_gradient_of_horizon_and_bootstrap_is_the_adjoint(backend, horizon):
    rewards, ends = ragged(9, 4, 0.3)
    values = torch.randn(9, 4).double().requires_grad_()

    def returns(r: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return discounted_returns(r, ends, 0.9, horizon=horizon, bootstrap=v, backend=backend)

    assert torch.autograd.gradcheck(returns, (rewards.double().requires_grad_(), values))


def test_values_that_are_not_read_have_no_gradient():
    rewards, ends = ragged(9, 4, 0.3)
    values = torch.full_like(rewards, torch.nan)
    values[ends], values[-1] = 1.0, 1.0
    discounted_returns(
        rewards.requires_grad_(), ends, 0.9, bootstrap=values.requires_grad_()
    ).sum().backward()
    last = ends.clone()
    last[-1] = True
    assert torch.equal(values.grad != 0, last)
    assert rewards.grad.isfinite().all()


def test_operator_checks():
    rewards, ends = ragged(9, 4, 0.3)
    horizon = torch.ops.covr_fast.horizon_returns.default
    torch.library.opcheck(horizon, (rewards.clone().requires_grad_(), ends, 0.9, 3))
    torch.library.opcheck(horizon, (rewards.T, ends.T, 0.9, 3))
    operator = torch.ops.covr_fast.discounted_returns.default
    torch.library.opcheck(operator, (rewards.requires_grad_(), ends, 0.9))
    torch.library.opcheck(operator, (rewards.detach().T, ends.T, 0.9))


def test_compiles_into_one_graph():
    rewards, ends = ragged(9, 4, 0.3)
    compiled = torch.compile(
        lambda r, e: discounted_returns(r * 2, e, 0.9) + 1, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(rewards, ends), discounted_returns(rewards * 2, ends, 0.9) + 1)


def test_horizon_and_bootstrap_compile_into_one_graph():
    rewards, ends = ragged(9, 4, 0.3)

    def run(r: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        return discounted_returns(r, e, 0.9, horizon=3, bootstrap=r * 2)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rewards, ends), run(rewards, ends))


@pytest.mark.parametrize(
    "rewards, ends, gamma, message",
    [
        (torch.ones(3), torch.zeros(3, dtype=torch.bool), 0.9, r"rewards must be floating \[T, N\]"),
        (torch.ones(3, 1, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.bool), 0.9, "rewards must be"),
        (torch.ones(3, 1), torch.zeros(3, 1), 0.9, "ends must be bool"),
        (torch.ones(3, 1), torch.zeros(2, 1, dtype=torch.bool), 0.9, "ends must be bool"),
        (torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.bool), 1.5, "gamma must be in"),
        (torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.bool), float("nan"), "gamma must be in"),
    ],
)
def test_errors_name_the_argument(rewards, ends, gamma, message):
    with pytest.raises(ValueError, match=message):
        discounted_returns(rewards, ends, gamma)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"horizon": 0}, "horizon must be at least 1, or None for whole episodes, not 0"),
        (
            {"bootstrap": torch.zeros(2, 1)},
            r"bootstrap must be floating \[3, 1\] like rewards, not .* \[2, 1\]",
        ),
        ({"bootstrap": torch.zeros(3, 1, dtype=torch.int64)}, "bootstrap must be floating"),
        ({"bootstrap": torch.zeros(3, 1, device="meta")}, "bootstrap is on meta but rewards is on cpu"),
    ],
)
def test_errors_of_horizon_and_bootstrap_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        discounted_returns(torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.bool), 0.9, **options)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [0, 1, 3, 33, 4000])
@pytest.mark.parametrize("steps", [0, 1, 300, 9999])
@pytest.mark.parametrize("rate", [0.0, 0.01, 0.5, 1.0])
def test_cuda(steps, columns, rate, dtype):
    rewards, ends = ragged(steps, columns, rate)
    rewards = rewards.to(dtype)
    expected = discounted_returns(rewards, ends, 0.99, backend="cpp")
    first = discounted_returns(rewards.cuda(), ends.cuda(), 0.99, backend="cuda")
    second = discounted_returns(rewards.cuda(), ends.cuda(), 0.99, backend="cuda")
    tolerance = 5e-5 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(first.cpu(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(first, second)  # deterministic


@pytest.mark.needs_cuda
@pytest.mark.parametrize("columns", [0, 1, 3, 33, 4000])
@pytest.mark.parametrize("steps", [0, 1, 300])
@pytest.mark.parametrize("horizon", [1, 30, 1000])
def test_cuda_gives_the_bits_of_the_cpu_over_a_horizon(steps, columns, horizon):
    rewards, ends = ragged(steps, columns, 0.01)
    values = torch.randn(steps, columns)
    expected = discounted_returns(rewards, ends, 0.99, horizon=horizon, bootstrap=values, backend="cpp")
    on_device = (rewards.cuda(), ends.cuda(), 0.99)
    result = discounted_returns(*on_device, horizon=horizon, bootstrap=values.cuda(), backend="cuda")
    assert torch.equal(result.cpu(), expected)
    wide = discounted_returns(on_device[0].double(), *on_device[1:], horizon=horizon, backend="cuda")
    torch.testing.assert_close(
        wide.cpu(), discounted_returns(rewards.double(), ends, 0.99, horizon=horizon), rtol=1e-12, atol=1e-12
    )


@pytest.mark.needs_cuda
def test_cuda_nan_does_not_leak_into_the_episode_before():
    for columns in (1, 40):
        rewards = torch.ones(3000, columns, device="cuda")
        ends = torch.zeros(3000, columns, dtype=torch.bool, device="cuda")
        rewards[1500], ends[1400] = torch.nan, True
        result = discounted_returns(rewards, ends, 0.9, backend="cuda")
        assert result[:1401].isfinite().all()
        assert result[1401:1501].isnan().all()
        assert result[1501:].isfinite().all()
