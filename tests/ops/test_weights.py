import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from covr_fast.ops import return_weights


def test_worked_example(backend):
    weights = return_weights(torch.tensor([0.0, 5.0, 7.5, 10.0]), backend=backend)
    assert weights.tolist() == [0.0, 0.0, 0.5, 1.0]


def test_equal_returns_all_count(backend):
    assert return_weights(torch.full((5,), 3.3), backend=backend).tolist() == [1.0] * 5
    assert return_weights(torch.tensor([-2.0]), backend=backend).tolist() == [1.0]
    assert return_weights(torch.empty(0), backend=backend).shape == (0,)


@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=50))
def test_properties(backend, values):
    returns = torch.tensor(values)
    weights = return_weights(returns, backend=backend)
    assert ((weights >= 0) & (weights <= 1)).all()
    assert weights[returns.argmax()] == 1
    order = returns.argsort()
    assert (weights[order].diff() >= 0).all()
    torch.testing.assert_close(weights, return_weights(returns, backend="reference"))


def test_dtypes_and_strides():
    returns = torch.randn(20)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert return_weights(returns.to(dtype)).dtype == dtype
    assert torch.equal(return_weights(returns[::2]), return_weights(returns[::2].clone()))
    assert not return_weights(returns.requires_grad_()).requires_grad


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"returns must be floating \[K\]"):
        return_weights(torch.ones(2, 2))


def test_operator_checks_and_compiles():
    returns = torch.randn(30)
    torch.library.opcheck(torch.ops.covr_fast.return_weights.default, (returns,))
    compiled = torch.compile(lambda x: return_weights(x + 1), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(returns), return_weights(returns + 1))


@pytest.mark.needs_cuda
@pytest.mark.parametrize("count", [1, 2, 31, 5000, 1_000_003])
def test_cuda(count):
    returns = torch.randn(count) * 100
    torch.testing.assert_close(return_weights(returns.cuda(), backend="cuda").cpu(), return_weights(returns))
    same = torch.full((count,), -3.5, device="cuda")
    assert (return_weights(same, backend="cuda") == 1).all()
