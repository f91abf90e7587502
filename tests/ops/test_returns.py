import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from covr_fast.ops import discounted_returns


def truth(rewards: torch.Tensor, ends: torch.Tensor, gamma: float) -> np.ndarray:
    """float64, written as the definition is: each episode's sum on its own."""
    r, e = rewards.double().numpy(), ends.numpy()
    g = np.zeros_like(r)
    for n in range(r.shape[1]):
        for t in range(r.shape[0]):
            for k in range(t, r.shape[0]):
                g[t, n] += gamma ** (k - t) * r[k, n]
                if e[k, n]:
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


def test_operator_checks():
    rewards, ends = ragged(9, 4, 0.3)
    operator = torch.ops.covr_fast.discounted_returns.default
    torch.library.opcheck(operator, (rewards.requires_grad_(), ends, 0.9))
    torch.library.opcheck(operator, (rewards.detach().T, ends.T, 0.9))


def test_compiles_into_one_graph():
    rewards, ends = ragged(9, 4, 0.3)
    compiled = torch.compile(
        lambda r, e: discounted_returns(r * 2, e, 0.9) + 1, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(rewards, ends), discounted_returns(rewards * 2, ends, 0.9) + 1)


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
def test_cuda_nan_does_not_leak_into_the_episode_before():
    for columns in (1, 40):
        rewards = torch.ones(3000, columns, device="cuda")
        ends = torch.zeros(3000, columns, dtype=torch.bool, device="cuda")
        rewards[1500], ends[1400] = torch.nan, True
        result = discounted_returns(rewards, ends, 0.9, backend="cuda")
        assert result[:1401].isfinite().all()
        assert result[1401:1501].isnan().all()
        assert result[1501:].isfinite().all()
