import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from covr_fast.ops import SumTree

CAPACITIES = [1, 2, 31, 32, 33, 1000, 1024, 1025, 40_000]


def filled(capacity: int, backend: str, device: str = "cpu") -> tuple[SumTree, torch.Tensor]:
    priorities = torch.rand(capacity, generator=torch.Generator().manual_seed(capacity))
    tree = SumTree(capacity, device, backend=backend)
    tree.update(torch.arange(capacity, device=device), priorities.to(device))
    return tree, priorities


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_total_and_priorities(capacity, backend):
    tree, priorities = filled(capacity, backend)
    assert len(tree) == capacity
    assert torch.equal(tree.priorities, priorities)
    assert tree.total == pytest.approx(priorities.double().sum().item(), rel=1e-14)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_draws_equal_the_reference(capacity):
    kernel, _ = filled(capacity, "cpp")
    truth, _ = filled(capacity, "reference")
    for batch_size in (1, 7, 256):
        drawn = kernel.sample(batch_size, torch.Generator().manual_seed(3))
        expected = truth.sample(batch_size, torch.Generator().manual_seed(3))
        assert torch.equal(drawn[0], expected[0])
        torch.testing.assert_close(drawn[1], expected[1], rtol=1e-12, atol=0)


def test_frequencies_follow_the_priorities(backend):
    tree = SumTree(100, backend=backend)
    priorities = torch.arange(100).float()
    tree.update(torch.arange(100), priorities)
    indices, probabilities = tree.sample(200_000, torch.Generator().manual_seed(0))
    expected = priorities.double() / priorities.sum()
    torch.testing.assert_close(probabilities, expected[indices])
    frequency = indices.bincount(minlength=100) / 200_000
    # Stratified: a leaf gets its share of the draws to within one at either end.
    torch.testing.assert_close(frequency.double(), expected, rtol=0, atol=2 / 200_000)


@given(
    capacity=st.integers(1, 300),
    writes=st.lists(st.tuples(st.integers(0, 299), st.sampled_from([0.0, 1e-8, 0.5, 3.0, 1e8])), max_size=60),
    seed=st.integers(0, 2**20),
)
def test_a_leaf_of_priority_zero_is_never_drawn(backend, capacity, writes, seed):
    tree = SumTree(capacity, backend=backend)
    leaves = torch.zeros(capacity)
    for begin in range(0, len(writes), 7):
        part = writes[begin : begin + 7]
        indices = torch.tensor([index % capacity for index, _ in part])
        tree.update(indices, torch.tensor([priority for _, priority in part]))
        for index, priority in part:
            leaves[index % capacity] = priority
    assert torch.equal(tree.priorities, leaves)
    assert tree.total == pytest.approx(leaves.double().sum().item(), rel=1e-14)
    if tree.total > 0:
        indices, probabilities = tree.sample(64, torch.Generator().manual_seed(seed))
        assert (leaves[indices] > 0).all()
        assert (probabilities > 0).all()


def test_the_last_of_duplicate_indices_counts(backend):
    tree = SumTree(50, backend=backend)
    tree.update(torch.tensor([3, 7, 3, 7, 3]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert tree.priorities[[3, 7]].tolist() == [5.0, 4.0]
    assert tree.total == 9.0


def test_no_drift_after_many_updates():
    tree, _ = filled(5000, "cpp")
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        indices = torch.randint(0, 5000, (256,), generator=generator)
        magnitudes = 10.0 ** torch.randint(-6, 6, (256,), generator=generator)
        tree.update(indices, torch.rand(256, generator=generator) * magnitudes)
    assert tree.total == pytest.approx(tree.priorities.double().sum().item(), rel=1e-14)


def test_same_generator_same_draws():
    tree, _ = filled(1000, "cpp")
    one = tree.sample(32, torch.Generator().manual_seed(5))[0]
    assert torch.equal(one, tree.sample(32, torch.Generator().manual_seed(5))[0])
    assert not torch.equal(one, tree.sample(32, torch.Generator().manual_seed(6))[0])


@pytest.mark.parametrize(
    "indices, priorities, message",
    [
        ([10], [1.0], "index 10 is not in"),
        ([-1], [1.0], "index -1 is not in"),
        ([1], [-1.0], "finite and not negative"),
        ([1], [float("nan")], "finite and not negative"),
        ([1], [float("inf")], "finite and not negative"),
    ],
)
def test_a_bad_update_changes_nothing(indices, priorities, message, backend):
    tree, before = filled(10, backend)
    with pytest.raises(ValueError, match=message):
        tree.update(torch.tensor([0, *indices]), torch.tensor([9.0, *priorities]))
    assert torch.equal(tree.priorities, before)


def test_errors_name_the_argument():
    tree = SumTree(10)
    with pytest.raises(ValueError, match="all priorities are zero"):
        tree.sample(4)
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        SumTree(0)
    with pytest.raises(ValueError, match="indices must be int64"):
        tree.update(torch.tensor([1.0]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="priorities must be floating"):
        tree.update(torch.tensor([1, 2]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        filled(10, "cpp")[0].sample(0)


def test_float64_priorities_and_strides():
    tree = SumTree(10)
    tree.update(torch.arange(10)[::2], torch.arange(10, dtype=torch.float64)[1::2])
    assert tree.priorities[::2].tolist() == [1.0, 3.0, 5.0, 7.0, 9.0]


def test_operator_checks():
    tree, _ = filled(100, "cpp")
    leaves, sums = tree._leaves, tree._sums
    update = (leaves, sums, tree._claims, torch.tensor([1, 2]), torch.tensor([1.0, 2.0]))
    torch.library.opcheck(torch.ops.covr_fast.sum_tree_update.default, update)
    jitter = torch.rand(10).double()
    torch.library.opcheck(torch.ops.covr_fast.sum_tree_sample.default, (leaves, sums, jitter))
    torch.library.opcheck(torch.ops.covr_fast.sum_tree_sample.default, (leaves, sums, jitter[::2]))
    draw = torch.ops.covr_fast.sum_tree_sample
    assert torch.equal(draw(leaves, sums, jitter[::2])[0], draw(leaves, sums, jitter[::2].contiguous())[0])


def test_operators_compile_into_one_graph():
    def step(tree, indices, priorities, jitter):
        tree.update(indices, priorities)
        return torch.ops.covr_fast.sum_tree_sample(tree._leaves, tree._sums, jitter)

    arguments = (torch.tensor([1, 5, 1]), torch.tensor([1.0, 2.0, 9.0]), torch.rand(8).double())
    eager, traced = filled(100, "cpp")[0], filled(100, "cpp")[0]
    expected = step(eager, *arguments)
    result = torch.compile(step, fullgraph=True, backend="aot_eager")(traced, *arguments)
    assert torch.equal(result[0], expected[0])
    assert torch.equal(traced.priorities, eager.priorities)
    assert traced.total == eager.total


@pytest.mark.needs_cuda
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_cuda_draws_equal_the_cpu_kernel(capacity):
    host, priorities = filled(capacity, "cpp")
    device = SumTree(capacity, "cuda", backend="cuda")
    device.update(torch.arange(capacity, device="cuda"), priorities.cuda())
    assert device.total == pytest.approx(host.total, rel=1e-14)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        indices = torch.randint(0, capacity, (257,), generator=generator)
        values = torch.rand(257, generator=generator)
        host.update(indices, values)
        device.update(indices.cuda(), values.cuda())
        assert torch.equal(device.priorities.cpu(), host.priorities)
        assert device.total == pytest.approx(host.total, rel=1e-14)
        jitter = torch.rand(100, dtype=torch.float64, generator=generator)
        drawn = torch.ops.covr_fast.sum_tree_sample(device._leaves, device._sums, jitter.cuda())
        expected = torch.ops.covr_fast.sum_tree_sample(host._leaves, host._sums, jitter)
        assert torch.equal(drawn[0].cpu(), expected[0])
        torch.testing.assert_close(drawn[1].cpu(), expected[1])


@pytest.mark.needs_cuda
def test_cuda_skips_what_it_cannot_raise_for():
    tree = SumTree(10, "cuda", backend="cuda")
    indices = torch.tensor([1, 10, -1, 2, 3], device="cuda")
    tree.update(indices, torch.tensor([1.0, 5.0, 5.0, float("nan"), -1.0], device="cuda"))
    assert tree.total == 1.0
    assert tree.priorities.tolist() == [0, 1, *[0] * 8]


@pytest.mark.needs_cuda
def test_cuda_sampling_an_empty_tree_gives_probability_zero():
    indices, probabilities = SumTree(40, "cuda", backend="cuda").sample(3)
    assert indices.tolist() == [0, 0, 0]
    assert probabilities.tolist() == [0, 0, 0]
