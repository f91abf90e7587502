import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from covr_fast.ops import _projection, return_weighted_cross_entropy, return_weighted_linear_cross_entropy

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The kernels of this machine; the interpreter adds Triton's (CI runs this file a second time with it).
KERNELS = [
    "cpp",
    pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")),
]


@pytest.fixture(scope="session", params=["reference", *KERNELS])
def backend(request):
    return request.param


WEIGHTS = {
    "dense": [0.2, 1.0, 0.7, 0.4],
    "half_zero": [0.0, 1.0, 0.0, 0.4],
    "all_zero": [0.0, 0.0, 0.0, 0.0],
}
PER_LABEL = "per_label"
"""Instead of one of WEIGHTS: one weight for each label, half of them zero."""


if INTERPRETED:
    import triton
    import triton.language as tl

    @triton.jit
    def store_as(target, source):
        tl.store(target, tl.load(source).to(target.dtype.element_ty))


def batch(vocabulary, weights="dense", *, steps=5, dim=16, dtype=torch.float32, device="cpu"):
    """hidden, head, labels (one ignored in each sample) and weights [4] or [4, steps], of four samples."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, steps, dim, generator=generator).to(dtype)
    head = (torch.randn(vocabulary, dim, generator=generator) / 4).to(dtype)
    labels = torch.randint(0, vocabulary, (4, steps), generator=generator)
    labels[:, 0] = -100
    if weights == PER_LABEL:
        chosen = torch.rand(4, steps, generator=generator).sub(0.5).clamp_min(0)
    else:
        chosen = torch.tensor(WEIGHTS[weights])
    return [x.to(device) for x in (hidden, head, labels, chosen)]


def truth(logits, labels, weights, smoothing=0.0, ignore_index=-100):
    """Eq. 6 in float64 and a plain loop over samples; weights [B] or [B, T]."""
    total = logits.flatten()[:0].sum()  # 0, and a graph where every weight is zero
    for b in range(logits.shape[0]):
        read = weights[b].expand(labels.shape[1]) > 0  # logits of weight zero may be NaN
        nll = F.cross_entropy(
            logits[b][read].double(),
            labels[b][read],
            reduction="none",
            label_smoothing=smoothing,
            ignore_index=ignore_index,
        )
        total = total + (weights[b].expand(labels.shape[1])[read].double() * nll).sum()
    return total / max(1, int((labels != ignore_index).sum()))


def value_and_gradients(function, *inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*inputs)
    value.backward()
    return [value.detach(), *(x.grad for x in inputs)]


def exact(hidden, head, labels, weights, smoothing=0.0):
    """The loss in float64 and its gradients in hidden and head."""
    return value_and_gradients(
        lambda h, w: truth(F.linear(h, w), labels, weights, smoothing), hidden.double(), head.double()
    )


def from_logits(logits, labels, weights, **options):
    """return_weighted_cross_entropy and its gradient."""
    return value_and_gradients(lambda x: return_weighted_cross_entropy(x, labels, weights, **options), logits)


def fused(hidden, head, labels, weights, **options):
    """return_weighted_linear_cross_entropy and its gradients in hidden and head."""
    return value_and_gradients(
        lambda h, w: return_weighted_linear_cross_entropy(h, w, labels, weights, **options), hidden, head
    )


@pytest.mark.parametrize("weights", [*WEIGHTS, PER_LABEL])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("vocabulary", [2, 7, 4096, 4099, 9001])
def test_logits_against_float64(vocabulary, smoothing, weights, backend):
    hidden, head, labels, weights = batch(vocabulary, weights)
    logits = F.linear(hidden, head)
    expected = value_and_gradients(lambda x: truth(x, labels, weights, smoothing), logits.double())
    result = from_logits(logits, labels, weights, label_smoothing=smoothing, backend=backend)
    assert result[0].dtype == torch.float32
    slack = 100 if backend == "reference" else 1  # torch adds up large rows in a single float
    torch.testing.assert_close(
        result, expected, rtol=slack * 1e-5, atol=slack * 1e-7 / vocabulary, check_dtype=False
    )


@pytest.mark.parametrize("weights", [*WEIGHTS, PER_LABEL])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("vocabulary, chunk_rows", [(2, 100), (1000, 100), (4099, 3)])
def test_linear_against_float64(vocabulary, chunk_rows, smoothing, weights, backend, monkeypatch):
    monkeypatch.setitem(_projection.CHUNK_BYTES, "cpu", chunk_rows * vocabulary * 4)
    hidden, head, labels, weights = batch(vocabulary, weights)
    expected = exact(hidden, head, labels, weights, smoothing)
    result = fused(hidden, head, labels, weights, label_smoothing=smoothing, backend=backend)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-7, check_dtype=False)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_the_interpreter_truncates_bfloat16():
    """Why bfloat16 is skipped below: when this fails, remove both."""
    source, target = torch.tensor([1 + 0.75 * 2**-7]), torch.empty(1, dtype=torch.bfloat16)
    store_as[(1,)](target, source)
    assert source.bfloat16().item() == 1 + 2**-7
    assert target.item() == 1


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_error_is_not_larger_than_that_of_torch_in_the_same_dtype(dtype, smoothing, backend, monkeypatch):
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bfloat16 stores truncate (test_the_interpreter_truncates_bfloat16)")
    monkeypatch.setitem(_projection.CHUNK_BYTES, "cpu", 8 * 3001 * 4)
    hidden, head, labels, weights = batch(3001, steps=9, dtype=dtype)
    expected = exact(hidden, head, labels, weights, smoothing)

    def plain(h, w):
        nll = F.cross_entropy(
            F.linear(h, w).mT, labels, reduction="none", label_smoothing=smoothing, ignore_index=-100
        )
        return (nll * weights[:, None]).sum() / (labels != -100).sum()

    torch_result = value_and_gradients(plain, hidden, head)
    result = fused(hidden, head, labels, weights, label_smoothing=smoothing, backend=backend)
    for one, other, right in zip(result, torch_result, expected, strict=True):
        error = (one.double() - right).norm()
        assert error <= 1.2 * (other.double() - right).norm() + 1e-6 * right.norm()


@pytest.mark.parametrize("available", [True, False])
def test_head_gradient_with_and_without_products_added_in_float32(available, monkeypatch):
    """torch adds a half-precision product to a float32 sum on CUDA alone, and not in every version."""

    def addmm(total, a, b, *, beta=1, out_dtype, out):
        if not available:
            raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")
        assert out is total
        return out.copy_(a.float() @ b.float() + (total if beta else 0))

    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(_projection, "_adds_in_float32", _projection._adds_in_float32.__wrapped__)
    monkeypatch.setitem(_projection.CHUNK_BYTES, "cpu", 4 * 50 * 2)
    hidden, head, labels, weights = batch(50, dtype=torch.bfloat16)
    expected = exact(hidden, head, labels, weights)
    result = fused(hidden, head, labels, weights)
    assert result[2].dtype == torch.bfloat16
    for one, other in zip(result, expected, strict=True):
        assert (one.double() - other).norm() <= 2**-7 * other.norm()


def test_zero_weight_rows_are_not_read(backend):
    hidden, head, labels, weights = batch(50, "half_zero")
    logits = F.linear(hidden, head)
    poisoned = logits.clone()
    poisoned[0] = poisoned[2] = torch.nan
    poisoned[:, 0] = torch.inf  # ignored labels
    clean = from_logits(logits, labels, weights, backend=backend)
    result = from_logits(poisoned, labels, weights, backend=backend)
    torch.testing.assert_close(result, clean, rtol=0, atol=0)
    assert (result[1][0] == 0).all()
    assert (result[1][:, 0] == 0).all()


def test_labels_of_weight_zero_are_not_read(backend):
    hidden, head, labels, weights = batch(50, PER_LABEL)
    logits = F.linear(hidden, head)
    unread = weights == 0
    assert 0 < unread[:, 1:].sum() < unread[:, 1:].numel()
    clean = from_logits(logits, labels, weights, backend=backend)
    result = from_logits(logits.masked_fill(unread[..., None], torch.nan), labels, weights, backend=backend)
    torch.testing.assert_close(result, clean, rtol=0, atol=0)
    assert (result[1][unread] == 0).all()
    assert (result[1][~unread & (labels != -100)] != 0).any(-1).all()
    if backend != "reference":  # which projects all rows
        clean = fused(hidden, head, labels, weights, backend=backend)
        result = fused(
            hidden.masked_fill(unread[..., None], torch.nan), head, labels, weights, backend=backend
        )
        torch.testing.assert_close(result, clean, rtol=0, atol=0)


def test_a_weight_per_sample_is_that_of_all_its_labels(backend):
    hidden, head, labels, weights = batch(50, "half_zero")
    spread = weights[:, None].expand_as(labels)  # not contiguous
    for result, expected in (
        (fused(hidden, head, labels, w, backend=backend) for w in (spread, weights)),
        (from_logits(F.linear(hidden, head), labels, w, backend=backend) for w in (spread, weights)),
    ):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_without_a_valid_label_everything_is_zero(backend):
    hidden, head, labels, weights = batch(50)
    labels.fill_(-100)
    for value in (
        *from_logits(F.linear(hidden, head), labels, weights, backend=backend),
        *fused(hidden, head, labels, weights, backend=backend),
    ):
        assert (value == 0).all()


def test_every_valid_label_counts_in_the_divisor(backend):
    logits = torch.zeros(2, 3, 8)
    labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
    value = return_weighted_cross_entropy(logits, labels, torch.tensor([1.0, 0.0]), backend=backend)
    torch.testing.assert_close(value, torch.tensor(8.0).log() * 2 / 3)


def test_large_and_masked_logits(backend):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 5000, generator=generator) * 300
    logits[:, :, ::3] = -torch.inf  # a grammar mask
    logits[1] += 3e4
    labels = torch.randint(0, 1600, (4, 3), generator=generator) * 3 + 1
    weights = torch.tensor(WEIGHTS["dense"])
    expected = value_and_gradients(lambda x: truth(x, labels, weights), logits.double())
    result = from_logits(logits, labels, weights, backend=backend)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-8, check_dtype=False)
    assert (result[1][:, :, ::3] == 0).all()


@pytest.mark.parametrize("backend", KERNELS)
@given(
    vocabulary=st.integers(1, 70),
    steps=st.integers(1, 6),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    smoothing=st.floats(0, 1),
    seed=st.integers(0, 2**20),
)
def test_any_logits(backend, vocabulary, steps, scale, smoothing, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, steps, vocabulary, generator=generator) * scale
    labels = torch.randint(-1, vocabulary, (3, steps), generator=generator)
    weights = torch.rand(3, generator=generator).sub(0.4).clamp_min(0)
    expected = value_and_gradients(lambda x: truth(x, labels, weights, smoothing, -1), logits.double())
    options = {"label_smoothing": smoothing, "ignore_index": -1, "backend": backend}
    result = from_logits(logits, labels, weights, **options)
    torch.testing.assert_close(result, expected, rtol=2e-5, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("trainable", [(True, False), (False, True), (False, False)])
def test_only_what_requires_a_gradient_gets_one(trainable):
    hidden, head, labels, weights = batch(50, "half_zero")
    expected = fused(hidden, head, labels, weights)
    hidden.requires_grad_(trainable[0])
    head.requires_grad_(trainable[1])
    value = return_weighted_linear_cross_entropy(hidden, head, labels, weights)
    torch.testing.assert_close(value.detach(), expected[0])
    assert value.requires_grad == any(trainable)
    if any(trainable):
        (value * 3).backward()
    for tensor, gradient in zip((hidden, head), expected[1:], strict=True):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, 3 * gradient)
        else:
            assert tensor.grad is None


def test_backward_twice_and_no_grad():
    hidden, head, labels, weights = batch(50)
    hidden.requires_grad_()
    value = return_weighted_linear_cross_entropy(hidden, head, labels, weights)
    value.backward(retain_graph=True)
    once = hidden.grad.clone()
    value.backward()
    torch.testing.assert_close(hidden.grad, 2 * once)
    with torch.no_grad():
        assert not return_weighted_linear_cross_entropy(hidden, head, labels, weights).requires_grad


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_gradient_belongs_to_its_reader(scale):
    hidden, head, labels, weights = batch(50)
    head.requires_grad_()
    loss = scale * return_weighted_linear_cross_entropy(hidden, head, labels, weights)
    (first,) = torch.autograd.grad(loss, head, retain_graph=True)
    expected = first.clone()
    loss.backward(retain_graph=True)
    head.grad.mul_(5)
    torch.testing.assert_close(torch.autograd.grad(loss, head, retain_graph=True)[0], expected)
    first.mul_(5)
    torch.testing.assert_close(torch.autograd.grad(loss, head)[0], expected)


def test_a_gradient_that_is_only_passed_on_is_not_copied():
    hidden, head, labels, weights = batch(50)
    head.requires_grad_()
    loss = return_weighted_linear_cross_entropy(hidden, head, labels, weights)
    made = loss.grad_fn.saved_tensors[1].data_ptr()
    loss.backward()
    assert head.grad.data_ptr() == made


def test_tied_head_collects_both_gradients():
    """The output projection may be the input embedding: its gradient arrives from two sides."""
    _, head, labels, weights = batch(50)
    tokens = labels.clamp_min(0)
    results = [
        value_and_gradients(
            lambda w, b=backend: return_weighted_linear_cross_entropy(
                F.embedding(tokens, w), w, labels, weights, backend=b
            ),
            head,
        )
        for backend in ("cpp", "reference")
    ]
    torch.testing.assert_close(*results)


def test_non_contiguous_inputs():
    hidden, head, labels, weights = batch(50)
    expected = return_weighted_linear_cross_entropy(hidden, head, labels, weights)
    strided = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    result = return_weighted_linear_cross_entropy(
        strided, head.T.contiguous().T, labels.T.contiguous().T, torch.stack([weights, weights], 1)[:, 0]
    )
    torch.testing.assert_close(result, expected)
    logits = F.linear(hidden, head)
    mapped = value_and_gradients(
        lambda x: return_weighted_cross_entropy(x.transpose(1, 2), labels, weights), logits.mT.contiguous()
    )
    plain = from_logits(logits, labels, weights)
    torch.testing.assert_close([mapped[0], mapped[1].mT], plain)


def test_full_vocabulary_of_a_vlm():
    hidden, head, labels, weights = batch(151_936, "half_zero", steps=3, dim=8)
    results = [
        fused(hidden, head, labels, weights, label_smoothing=0.1, backend=backend)
        for backend in ("cpp", "reference")
    ]
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("label", [50, -1, 2**40])
def test_label_out_of_range_is_an_error(label, backend):
    hidden, head, labels, weights = batch(50)
    labels[1, 2] = label
    with pytest.raises(ValueError, match=rf"label {label} is not in \[0, 50\)"):
        return_weighted_linear_cross_entropy(hidden, head, labels, weights, backend=backend)
    with pytest.raises(ValueError, match=rf"label {label} is not in \[0, 50\)"):
        return_weighted_cross_entropy(F.linear(hidden, head), labels, weights, backend=backend)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": torch.ones(4, 16)}, r"hidden must be floating \[B, T, D\]"),
        ({"head": torch.ones(50, 3)}, r"head must be torch.float32 \[V, 16\]"),
        ({"head": torch.ones(50, 16, dtype=torch.float16)}, "head must be torch.float32"),
        ({"labels": torch.ones(4, 5)}, "labels must be int64"),
        ({"labels": torch.ones(4, 6, dtype=torch.int64)}, "labels must be int64"),
        ({"weights": torch.ones(5)}, r"weights must be floating \[4\] or \[4, 5\]"),
        ({"weights": torch.ones(4, 1)}, r"weights must be floating \[4\] or \[4, 5\]"),
        ({"weights": torch.ones(4, 5, dtype=torch.int64)}, "weights must be floating"),
        ({"weights": -torch.ones(4, 5)}, "weights must not be negative"),
        ({"weights": torch.tensor([1.0, 1, -1, 1])}, "weights must not be negative"),
        ({"weights": torch.tensor([1.0, 1, torch.nan, 1])}, "weights must not be negative"),
        ({"label_smoothing": 1.5}, "label_smoothing must be in"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = dict(zip(("hidden", "head", "labels", "weights"), batch(50), strict=True))
    with pytest.raises(ValueError, match=message):
        return_weighted_linear_cross_entropy(**arguments | change)


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_operator_checks(trained):
    hidden, head, labels, _ = batch(50)
    labels, scale = labels.flatten().abs() % 50, torch.rand(20)
    operators = torch.ops.covr_fast
    logits = F.linear(hidden, head).flatten(0, 1)
    _, normaliser = operators.cross_entropy(logits, labels, scale, 0.1, "cpp")
    upstream = torch.tensor(2.0)
    torch.library.opcheck(
        operators.cross_entropy_backward.default, (upstream, logits, labels, scale, 0.1, normaliser, "cpp")
    )
    torch.library.opcheck(operators.scale_gradient.default, (head, upstream))
    torch.library.opcheck(
        operators.cross_entropy.default, (logits.requires_grad_(), labels, scale, 0.1, "cpp")
    )
    rows, head = hidden.flatten(0, 1).requires_grad_(trained[0]), head.requires_grad_(trained[1])
    torch.library.opcheck(
        operators.linear_cross_entropy.default, (rows, head, labels, scale, 0.1, *trained, "cpp")
    )


@pytest.mark.parametrize("weights", ["half_zero", PER_LABEL])
def test_compiles_into_one_graph(weights):
    hidden, head, labels, weights = batch(50, weights)

    def model(h, w):
        linear = return_weighted_linear_cross_entropy(h * 2, w, labels, weights, label_smoothing=0.1)
        return linear + return_weighted_cross_entropy(F.linear(h, w), labels, weights)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_gradients(compiled, hidden, head), value_and_gradients(model, hidden, head)
    )


@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [*WEIGHTS, PER_LABEL])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("vocabulary", [2, 4099, 151_936])
def test_cuda_error_is_not_larger_than_that_of_torch(vocabulary, smoothing, weights, dtype, monkeypatch):
    monkeypatch.setitem(_projection.CHUNK_BYTES, "cuda", 7 * vocabulary * 4)
    hidden, head, labels, weights = batch(vocabulary, weights, steps=9, dim=64, dtype=dtype, device="cuda")
    options = {"label_smoothing": smoothing, "backend": "reference"}
    expected = fused(hidden.double(), head.double(), labels, weights, **options)
    plain = fused(hidden, head, labels, weights, **options)
    for on_cpu in (False, True):  # labels and weights may stay on the host
        place = (labels.cpu(), weights.cpu()) if on_cpu else (labels, weights)
        result = fused(hidden, head, *place, label_smoothing=smoothing, backend="triton")
        for one, other, right in zip(result, plain, expected, strict=True):
            error = (one.double() - right).norm()
            assert error <= 1.2 * (other.double() - right).norm() + 1e-5 * right.norm()


@pytest.mark.needs_cuda
def test_cuda_label_out_of_range_makes_nan_and_corrupts_nothing():
    hidden, head, labels, weights = batch(50, device="cuda")
    labels[1, 2], labels[2, 3] = 50, 2**40
    value = return_weighted_linear_cross_entropy(hidden.requires_grad_(), head, labels, weights)
    value.backward()
    torch.cuda.synchronize()
    assert value.isnan()
    assert hidden.grad[1, 2].isnan().all()
    assert hidden.grad[0].isfinite().all()


@pytest.mark.needs_cuda
def test_cuda_graph_keeps_all_rows():
    hidden, head, labels, weights = batch(50, "half_zero", device="cuda")
    expected = return_weighted_linear_cross_entropy(hidden, head, labels, weights)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        return_weighted_linear_cross_entropy(hidden, head, labels, weights)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = return_weighted_linear_cross_entropy(hidden, head, labels, weights)
    graph.replay()
    torch.testing.assert_close(captured, expected)
