"""The operations against their peers, all in one run, as ratios.

    python benchmarks/bench_ops.py FILE.json             # measures, and leaves the table in FILE.md
    pytest benchmarks/bench_ops.py -k filter             # these rows alone

The limit is the time that the bytes moved by a perfect implementation take at the copy bandwidth measured in
the same run; for the linear cross-entropy, the time of its matrix products alone, into memory that is already
allocated, in the same rounds. Peers that cannot run are named with the reason; `pip install '.[bench]'`
installs all of them. CUDA rows appear where there is a device (`-m needs_cuda` runs only those).
"""

import math
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from race import Function, check_same, main, on_device, peer, race, sized, steady

from covr_fast import ops
from covr_fast.ops import reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]
ENTROPY = 0.7
PRODUCTS = "its matrix products alone"  # a contestant that nobody can beat


@cache
def bandwidth(device: str) -> float:
    """Bytes per second of a large copy, read and write counted."""
    source = torch.ones(sized(2**26, 2**20), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(steady(lambda: target.copy_(source), device) for _ in range(7))


def compare(
    benchmark,
    device: str,
    functions: Mapping[str, Function | str],
    *,
    rounds: int,
    same: Callable[[Any, Any], object] | None = None,
    moved: float | None = None,
    **notes: object,
) -> None:
    """Checks (if `same` says how), then races. `moved` are the bytes that a perfect implementation moves."""
    if same:
        check_same(functions, same)
    result = race(functions, sized(rounds, 1), partial(steady, device=device), benchmark=benchmark)
    if device == "cuda":
        result["on_device"] = on_device(functions["ours"])
    limit = result["seconds"].get(PRODUCTS, moved and moved / bandwidth(device))
    benchmark.extra_info.update(result, limit=limit, **notes)


def close(rtol: float, atol: float) -> Callable[[Any, Any], None]:
    return partial(torch.testing.assert_close, rtol=rtol, atol=atol, check_dtype=False)


# ---- returns, filter, weights ----


def filter_by_numpy(returns: np.ndarray) -> np.ndarray:
    z = (returns - returns.mean()) / returns.std()
    low, median, high = np.percentile(z, [25, 50, 75])
    return np.flatnonzero(z > median + (high - low) / (1 + math.exp(ENTROPY)))


def filter_by_torch(returns: torch.Tensor) -> torch.Tensor:
    z = (returns - returns.mean()) / returns.std(correction=0)
    low, median, high = torch.quantile(z, torch.tensor([0.25, 0.5, 0.75], device=z.device))
    return (z > median + (high - low) / (1 + math.exp(ENTROPY))).nonzero().squeeze(1)


@pytest.mark.parametrize("count", sized([5_000, 1_000_000], [500]))
@pytest.mark.parametrize("device", DEVICES)
def test_filter(benchmark, device, count):
    returns = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(device)
    kept = ops.exploration_filter(returns, ENTROPY).indices
    peers: dict[str, Function] = {"torch.quantile": partial(filter_by_torch, returns)}
    if device == "cpu":
        peers["numpy"] = partial(filter_by_numpy, returns.numpy())

    def same(ours, peer) -> bool:
        # The peers work in float32: a sample within rounding of the cutoff may fall on either side.
        return len(set(ours.tolist()) ^ set(peer.tolist())) <= 2

    check_same({"ours": lambda: kept, **peers}, same)
    ours = ops.exploration_filter if device == "cpu" else ops.exploration_filter_padded
    # Read once to find the cutoff and once to compare with it; the kept indices are written.
    moved = 2 * returns.nbytes + kept.nbytes
    compare(benchmark, device, {"ours": partial(ours, returns, ENTROPY), **peers}, rounds=15, moved=moved)


def reward_to_go(rewards: torch.Tensor, ends: torch.Tensor) -> Function:
    """TorchRL's takes time as the last but one dimension and expects the last step to be an end."""
    from torchrl.objectives.value.functional import reward2go

    rows, done = rewards.T.unsqueeze(-1).contiguous(), ends.T.unsqueeze(-1).clone()
    done[:, -1] = True
    return lambda: reward2go(rows, done, 0.99).squeeze(-1).T


@pytest.mark.parametrize("steps, columns", sized([(1000, 1000), (125_000, 8), (1_000_000, 100)], [(50, 10)]))
@pytest.mark.parametrize("device", DEVICES)
def test_returns(benchmark, device, steps, columns):
    if device == "cpu" and steps * columns > 10**6:
        pytest.skip("1e8 steps are a GPU's row")
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(steps, columns, generator=generator).to(device)
    ends = (torch.rand(steps, columns, generator=generator) < 0.003).to(device)
    functions = {"ours": partial(ops.discounted_returns, rewards, ends, 0.99)}
    if steps <= 1000:
        functions["torch loop"] = partial(reference.discounted_returns, rewards, ends, 0.99)
        functions["torchrl reward2go"] = peer(reward_to_go, rewards, ends)
    moved = 2 * rewards.nbytes + ends.nbytes
    compare(benchmark, device, functions, rounds=9, same=close(1e-4, 1e-4), moved=moved)


@pytest.mark.parametrize("device", DEVICES)
def test_return_weights(benchmark, device):
    count = sized(1_000_000, 1000)
    returns = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(device)

    def by_torch():
        low, high = returns.aminmax()
        return (2 * (returns - low) / (high - low) - 1).clamp_min(0)

    functions = {"ours": partial(ops.return_weights, returns), "torch": by_torch}
    moved = 3 * returns.nbytes  # read for the extremes, read and written for the map
    compare(benchmark, device, functions, rounds=15, same=close(0, 1e-6), moved=moved)


# ---- cross-entropy ----


def backward(loss: Function, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the first input's gradient, begun as a training step is: without earlier gradients."""
    for tensor in inputs:
        tensor.grad = None
    value = loss()
    value.backward()
    return value.detach(), inputs[0].grad


def same_loss_and_gradient(dtype: torch.dtype) -> Callable[[Any, Any], bool]:
    rtol, error = (1e-4, 1e-5) if dtype == torch.float32 else (2e-2, 2e-2)

    def same(ours, peer) -> bool:
        (value, gradient), (other, expected) = ours, peer
        torch.testing.assert_close(value.float(), other.float(), rtol=rtol, atol=1e-6)
        return (gradient.float() - expected.float()).norm() < error * expected.float().norm()

    return same


VOCABULARY = sized(151_936, 1000)


@pytest.mark.parametrize("device", DEVICES)
def test_cross_entropy(benchmark, device):
    rows, dtype = (128, torch.float32) if device == "cpu" else (4096, torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    shape = (8, sized(rows, 16) // 8)
    logits = torch.randn(*shape, VOCABULARY, generator=generator, device=device, dtype=dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, shape, generator=generator, device=device)
    weights = torch.rand(8, generator=generator, device=device).add(0.1)

    def torch_loss():
        nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return (nll * weights.repeat_interleave(labels.shape[1])).sum() / labels.numel()

    ours = partial(ops.return_weighted_cross_entropy, logits, labels, weights)
    functions = {
        name: partial(backward, loss, logits) for name, loss in (("ours", ours), ("torch", torch_loss))
    }
    moved = 3 * logits.nbytes  # read to reduce, read and written for the gradient
    compare(benchmark, device, functions, rounds=7, same=same_loss_and_gradient(dtype), moved=moved)


def peak_extra_bytes(device: str, function: Function) -> int:
    """The peak of memory in use during the call, less what was in use before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    ops.release_memory()  # what the call takes from there counts too
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of the resident set
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def liger(hidden, head, labels) -> Function:
    """Its fused loss knows no weights per row: it is timed without them."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    if hidden.device.type == "cpu":
        raise RuntimeError("its kernels are Triton's and run on GPUs only")
    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda: backward(lambda: loss(head, hidden.flatten(0, 1), labels.flatten()), hidden, head)


@pytest.mark.parametrize("share", ["all rows", "half the rows"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("device", DEVICES)
def test_linear_cross_entropy(benchmark, device, frozen, share):
    rows, dim, dtype = (512, 512, torch.float32) if device == "cpu" else (4096, 2048, torch.bfloat16)
    rows, dim, samples = sized(rows, 64), sized(dim, 32), 8
    on = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    shape = (samples, rows // samples)
    hidden = torch.randn(*shape, dim, **on).to(dtype).requires_grad_()
    head = (torch.randn(VOCABULARY, dim, **on) / dim**0.5).to(dtype)
    head.requires_grad_(not frozen)
    labels = torch.randint(0, VOCABULARY, shape, **on)
    all_rows = torch.rand(samples, **on).add(0.1)
    weights = all_rows.clone()
    if share == "half the rows":
        weights[::2] = 0
    row_weights = weights.repeat_interleave(shape[1])
    kept = row_weights.nonzero().squeeze(1)

    def ours(weights=weights):
        loss = partial(ops.return_weighted_linear_cross_entropy, hidden, head, labels, weights)
        return backward(loss, hidden, head)

    def full_logits():
        nll = F.cross_entropy(F.linear(hidden, head).flatten(0, 1), labels.flatten(), reduction="none")
        return (nll * row_weights).sum() / labels.numel()

    def torch_chunked():
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256 if device == "cpu" else 1024)

        def loss():
            nll = F.linear_cross_entropy(
                hidden.flatten(0, 1)[kept], head, labels.flatten()[kept], reduction="none", options=options
            )
            return (nll * row_weights[kept]).sum() / labels.numel()

        return partial(backward, loss, hidden, head)

    peers = {
        "full logits": partial(backward, full_logits, hidden, head),
        "torch chunked": peer(torch_chunked),
    }
    check_same({"ours": ours, **peers}, same_loss_and_gradient(dtype))
    if share == "half the rows":
        peers = {"ours, all rows": partial(ours, all_rows)}
    else:
        peers["liger"] = peer(liger, hidden, head, labels)

    inputs, matrix = hidden.detach().flatten(0, 1)[kept], head.detach()
    logits, input_gradient = inputs.new_empty(kept.numel(), VOCABULARY), torch.empty_like(inputs)
    matrix_gradient = torch.empty_like(matrix)

    def products():
        torch.mm(inputs, matrix.T, out=logits)
        torch.mm(logits, matrix, out=input_gradient)
        if not frozen:
            torch.mm(logits.T, inputs, out=matrix_gradient)

    hidden.grad = head.grad = None  # memory that the peak must not count as there before
    gradients = hidden.nbytes + (0 if frozen else head.nbytes)
    extra_bytes = peak_extra_bytes(device, ours) - gradients
    compare(
        benchmark,
        device,
        {"ours": ours, **peers, PRODUCTS: products},
        rounds=5 if device == "cpu" else 10,
        operations=(4 if frozen else 6) * kept.numel() * dim * VOCABULARY,
        extra_bytes=extra_bytes,
    )


# ---- frames and sum tree ----


def shift_of_drq(frames: torch.Tensor, offsets: torch.Tensor, pad: int = 4) -> torch.Tensor:
    """DrQ-v2's shift, here with given offsets: pad by the edge, sample a shifted grid bilinearly."""
    batch, _, height, _ = frames.shape
    x = F.pad(frames.float(), (pad,) * 4, "replicate")
    size = height + 2 * pad
    line = torch.linspace(-1 + 1 / size, 1 - 1 / size, size, device=frames.device)[:height]
    columns = line.expand(height, height)
    grid = torch.stack([columns, columns.T], dim=-1).expand(batch, -1, -1, -1)
    grid = grid + (offsets.flip(1).float() * 2 / size)[:, None, None]
    return F.grid_sample(x, grid, padding_mode="zeros", align_corners=False) / 255


@pytest.mark.parametrize("device", DEVICES)
def test_random_shift(benchmark, device):
    generator = torch.Generator().manual_seed(0)
    shape = (sized(256, 2), 9, 84, 84)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
    offsets = torch.randint(0, 9, (len(frames), 2), generator=generator).to(device)
    shifts = {"ours": ops.random_shift, "DrQ-v2 pad + grid_sample": shift_of_drq}
    functions = {name: partial(shift, frames, offsets) for name, shift in shifts.items()}
    moved = frames.nbytes + 4 * frames.nbytes
    compare(benchmark, device, functions, rounds=9, same=close(0, 1e-4), moved=moved)


def torchrl_tree(priorities: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> Function:
    try:
        from torchrl import _torchrl as extension
    except ImportError as error:
        raise RuntimeError(f"its extension does not load with torch {torch.__version__}") from error
    device, count = priorities.device, priorities.numel()
    if device.type == "cpu":
        tree = extension.SumSegmentTreeFp32(count)
    else:
        tree = extension.CudaSumSegmentTreeFp32(count, device)
    tree[torch.arange(count, device=device)] = priorities

    def update_and_sample():
        tree[indices] = values
        mass = torch.rand(indices.numel(), device=device) * tree.query(0, count)
        return tree.scan_lower_bound(mass)

    return update_and_sample


@pytest.mark.parametrize("device", DEVICES)
def test_sum_tree(benchmark, device):
    """Draws are random, so only the sums are compared."""
    generator = torch.Generator().manual_seed(0)
    count = sized(1_000_000, 1000)
    priorities = torch.rand(count, generator=generator).add(0.01).to(device)
    indices = torch.randint(0, count, (256,), generator=generator).to(device)
    values = torch.rand(256, generator=generator).to(device)
    tree = ops.SumTree(count, device)
    tree.update(torch.arange(count, device=device), priorities)
    assert tree.total == pytest.approx(priorities.double().sum().item(), rel=1e-12)

    def ours():
        tree.update(indices, values)
        return tree.sample(256)

    def cumulative():
        priorities[indices] = values
        total = priorities.cumsum(0)
        return torch.searchsorted(total, torch.rand(256, device=device) * total[-1])

    torchrl = peer(torchrl_tree, priorities, indices, values)
    functions = {"ours": ours, "cumsum + searchsorted": cumulative, "torchrl": torchrl}
    compare(benchmark, device, functions, rounds=50)


if __name__ == "__main__":
    raise SystemExit(main(__file__, Path(sys.argv[1])))
