"""The operations against their peers, all in one run, as ratios.

    python benchmarks/bench_ops.py benchmarks/results/ops_cpu.json

measures everything and leaves the table beside it, as Markdown.

Each row first checks that all contenders compute the same thing, then times them in turn, round by round and
with a pause between, so that a busy machine is busy for all of them; medians are compared. The limit is the
time that the bytes that a perfect implementation moves take at the copy bandwidth measured in the same run;
for the linear cross-entropy, the time of its matrix products alone, into memory at hand, in the same rounds.
Peers that cannot run are named with the reason; `pip install '.[bench]'` installs all of them. CUDA rows
appear where there is a device (`-m needs_cuda` runs only those).
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from covr_fast import ops
from covr_fast.ops import reference

Contender = Callable[[], object]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]
ENTROPY = 0.7
LIMIT = "its matrix products alone"  # a contender that nobody can beat


def wall_time(function: Contender) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def seconds(function: Contender, device: str) -> float:
    """One call's wall time on the CPU; on CUDA the mean of ten calls between two events."""
    if device == "cpu":
        # OpenMP's threads spin for about 10 ms after a loop of torch's, and would hold the next one's core.
        time.sleep(0.02)
        first = wall_time(function)
        return first if first > 0.05 else wall_time(function)  # a short call's first is a cold start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(10):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e4


@pytest.fixture(scope="module")
def bandwidth() -> Callable[[str], float]:
    """Bytes per second of a large copy, read and write counted, by device."""
    measured: dict[str, float] = {}

    def of(device: str) -> float:
        if device not in measured:
            source = torch.ones(2**26, device=device)
            target = torch.empty_like(source)
            best = min(seconds(lambda: target.copy_(source), device) for _ in range(7))
            measured[device] = 2 * source.nbytes / best
        return measured[device]

    return of


def race(
    benchmark,
    device: str,
    ours: Contender,
    peers: dict[str, Contender | str],
    *,
    rounds: int,
    limit: float | None = None,
    **facts: object,
) -> None:
    """Times ours and the peers in turn; a peer given as a string is one that cannot run, and why."""
    running = {name: peer for name, peer in peers.items() if not isinstance(peer, str)}
    times: dict[str, list[float]] = {name: [] for name in ("ours", *running)}

    def one_round() -> None:
        for name, contender in {"ours": ours, **running}.items():
            times[name].append(seconds(contender, device))

    # pytest-benchmark's own figure is that of ours alone; the comparison is made of the rounds before each.
    benchmark.pedantic(ours, setup=one_round, rounds=rounds, warmup_rounds=1)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    benchmark.extra_info.update(
        device=torch.cuda.get_device_name()
        if device == "cuda"
        else f"CPU, threads: {torch.get_num_threads()}",
        seconds=medians,
        unavailable={name: why for name, why in peers.items() if isinstance(why, str)},
        limit=medians.get(LIMIT, limit),
        **facts,
    )


# --- The filter


def filter_by_numpy(returns: np.ndarray) -> np.ndarray:
    z = (returns - returns.mean()) / returns.std()
    low, median, high = np.percentile(z, [25, 50, 75])
    return np.flatnonzero(z > median + (high - low) / (1 + math.exp(ENTROPY)))


def filter_by_torch(returns: torch.Tensor) -> torch.Tensor:
    z = (returns - returns.mean()) / returns.std(correction=0)
    low, median, high = torch.quantile(z, torch.tensor([0.25, 0.5, 0.75], device=z.device))
    return (z > median + (high - low) / (1 + math.exp(ENTROPY))).nonzero().squeeze(1)


@pytest.mark.parametrize("count", [5_000, 1_000_000])
@pytest.mark.parametrize("device", DEVICES)
def test_filter(benchmark, bandwidth, device, count):
    returns = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(device)
    kept = ops.exploration_filter(returns, ENTROPY).indices
    for peer in (torch.from_numpy(filter_by_numpy(returns.cpu().numpy())), filter_by_torch(returns).cpu()):
        # The peers work in float32: a sample within rounding of the cutoff may fall on either side.
        assert len(set(peer.tolist()) ^ set(kept.tolist())) <= 2
    peers: dict[str, Contender | str] = {"torch.quantile": lambda: filter_by_torch(returns)}
    if device == "cpu":
        array = returns.numpy()
        peers["numpy"] = lambda: filter_by_numpy(array)
        ours = lambda: ops.exploration_filter(returns, ENTROPY)  # noqa: E731
    else:
        ours = lambda: ops.exploration_filter_padded(returns, ENTROPY)  # noqa: E731
    # Read once to find the cutoff and once to compare with it; the kept indices are written.
    limit = (2 * returns.nbytes + kept.nbytes) / bandwidth(device)
    race(benchmark, device, ours, peers, rounds=15, limit=limit)


# --- Returns


def reward_to_go(rewards: torch.Tensor, ends: torch.Tensor) -> Contender | str:
    """TorchRL's takes time as the last but one dimension and wants the last step to be an end."""
    try:
        from torchrl.objectives.value.functional import reward2go
    except ImportError as error:
        return f"torchrl is not installed or does not load ({type(error).__name__})"
    rows, done = rewards.T.unsqueeze(-1).contiguous(), ends.T.unsqueeze(-1).clone()
    done[:, -1] = True
    return lambda: reward2go(rows, done, 0.99).squeeze(-1).T


@pytest.mark.parametrize("steps, columns", [(1000, 1000), (125_000, 8), (1_000_000, 100)])
@pytest.mark.parametrize("device", DEVICES)
def test_returns(benchmark, bandwidth, device, steps, columns):
    if device == "cpu" and steps * columns > 10**6:
        pytest.skip("1e8 steps are a GPU's row")
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(steps, columns, generator=generator).to(device)
    ends = (torch.rand(steps, columns, generator=generator) < 0.003).to(device)
    ours = lambda: ops.discounted_returns(rewards, ends, 0.99)  # noqa: E731
    peers: dict[str, Contender | str] = {}
    if steps <= 1000:
        peers["torch loop"] = lambda: reference.discounted_returns(rewards, ends, 0.99)
        peers["torchrl reward2go"] = reward_to_go(rewards, ends)
    for peer in peers.values():
        if not isinstance(peer, str):
            torch.testing.assert_close(peer(), ours(), rtol=1e-4, atol=1e-4)
    limit = (2 * rewards.nbytes + ends.nbytes) / bandwidth(device)
    race(benchmark, device, ours, peers, rounds=9, limit=limit)


# --- Weights


@pytest.mark.parametrize("device", DEVICES)
def test_return_weights(benchmark, bandwidth, device):
    returns = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)).to(device)
    ours = lambda: ops.return_weights(returns)  # noqa: E731

    def by_torch():
        low, high = returns.aminmax()
        return (2 * (returns - low) / (high - low) - 1).clamp_min(0)

    torch.testing.assert_close(ours(), by_torch(), rtol=0, atol=1e-6)
    limit = 3 * returns.nbytes / bandwidth(device)  # read for the extremes, read and written for the map
    race(benchmark, device, ours, {"torch": by_torch}, rounds=15, limit=limit)


# --- Cross-entropy from logits


@pytest.mark.parametrize("device", DEVICES)
def test_cross_entropy(benchmark, bandwidth, device):
    rows, dtype = (128, torch.float32) if device == "cpu" else (4096, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, rows // 8, 151_936, generator=generator).to(device, dtype).requires_grad_()
    labels = torch.randint(0, 151_936, logits.shape[:2], generator=generator).to(device)
    weights = torch.rand(8, generator=generator).add(0.1).to(device)

    def ours():
        return backward(lambda: ops.return_weighted_cross_entropy(logits, labels, weights), logits)

    def torch_loss():
        nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        row_weights = weights.repeat_interleave(labels.shape[1])
        return (nll * row_weights).sum() / labels.numel()

    def by_torch():
        return backward(torch_loss, logits)

    value = ours()
    gradient = logits.grad.clone()
    torch.testing.assert_close(
        value, by_torch().float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=0
    )
    error = (gradient.float() - logits.grad.float()).norm() / logits.grad.float().norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)
    limit = 3 * logits.nbytes / bandwidth(device)  # read to reduce, read and written for the gradient
    race(benchmark, device, ours, {"torch": by_torch}, rounds=7, limit=limit)


# --- Linear cross-entropy


def peak_extra_bytes(device: str, function: Contender) -> int | None:
    """Most memory held during the call beyond what was held before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    ops.release_memory()  # what the call takes from there counts too
    try:  # 5 resets the high-water mark of the resident set
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _resident("VmRSS")
    function()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def liger(hidden, head, labels) -> Contender | str:
    """Its fused loss knows no weights per row: it is timed without them."""
    if hidden.device.type == "cpu":
        return "its kernels are Triton's and run on GPUs only"
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return "liger-kernel is not installed"
    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda: backward(lambda: loss(head, hidden.flatten(0, 1), labels.flatten()), hidden, head)


def backward(loss: Callable[[], torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """The loss, forward and backward, begun as a step of training is: without the last one's gradients."""
    for tensor in inputs:
        tensor.grad = None
    value = loss()
    value.backward()
    return value.detach()


@pytest.mark.parametrize("share", ["all rows", "half the rows"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("device", DEVICES)
def test_linear_cross_entropy(benchmark, device, frozen, share):
    rows, dim, dtype = (512, 512, torch.float32) if device == "cpu" else (4096, 2048, torch.bfloat16)
    vocabulary, samples = 151_936, 8
    generator = torch.Generator().manual_seed(0)
    shape = (samples, rows // samples)
    hidden = torch.randn(*shape, dim, generator=generator).to(device, dtype).requires_grad_()
    head = (torch.randn(vocabulary, dim, generator=generator) / dim**0.5).to(device, dtype)
    head.requires_grad_(not frozen)
    labels = torch.randint(0, vocabulary, shape, generator=generator).to(device)
    weights = torch.rand(samples, generator=generator).add(0.1).to(device)
    dense = weights.clone()
    if share == "half the rows":
        weights[::2] = 0
    valid = labels.numel()
    row_weights = weights.repeat_interleave(shape[1])

    def ours(weights=weights):
        loss = partial(ops.return_weighted_linear_cross_entropy, hidden, head, labels, weights)
        return backward(loss, hidden, head)

    def full_logits_loss():
        nll = F.cross_entropy(F.linear(hidden, head).flatten(0, 1), labels.flatten(), reduction="none")
        return (nll * row_weights).sum() / valid

    kept = row_weights.nonzero().squeeze(1)

    def torch_chunked_loss():
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256 if device == "cpu" else 1024)
        nll = F.linear_cross_entropy(
            hidden.flatten(0, 1)[kept], head, labels.flatten()[kept], reduction="none", options=options
        )
        return (nll * row_weights[kept]).sum() / valid

    full_logits, torch_chunked = (
        partial(backward, loss, hidden, head) for loss in (full_logits_loss, torch_chunked_loss)
    )

    value = ours()
    gradient = hidden.grad.clone()
    expected = full_logits()
    tolerance = {"rtol": 1e-4, "atol": 1e-8} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-6}
    torch.testing.assert_close(value, expected.float(), **tolerance)
    error = (gradient.float() - hidden.grad.float()).norm() / hidden.grad.float().norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)

    peers: dict[str, Contender | str] = {}
    if share == "half the rows":
        peers["ours, all rows"] = lambda: ours(dense)
    else:
        peers["full logits"] = full_logits
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):
            peers["torch chunked"] = torch_chunked
        else:
            peers["torch chunked"] = f"torch {torch.__version__} has no chunked linear_cross_entropy"
        peers["liger"] = liger(hidden, head, labels)
    rows_kept, matrix = hidden.detach().flatten(0, 1)[kept], head.detach()
    logits, row_gradient = rows_kept.new_empty(kept.numel(), vocabulary), torch.empty_like(rows_kept)
    matrix_gradient = torch.empty_like(matrix)

    def products():
        torch.mm(rows_kept, matrix.T, out=logits)
        torch.mm(logits, matrix, out=row_gradient)
        if not frozen:
            torch.mm(logits.T, rows_kept, out=matrix_gradient)

    peers[LIMIT] = products
    hidden.grad = head.grad = None  # or the peak below would be counted from what they hold
    race(
        benchmark,
        device,
        ours,
        peers,
        rounds=5 if device == "cpu" else 10,
        operations=(4 if frozen else 6) * kept.numel() * dim * vocabulary,
        peak_extra_bytes=peak_extra_bytes(device, ours),
        gradient_bytes=hidden.nbytes + (0 if frozen else head.nbytes),
    )


# --- Frames


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
def test_random_shift(benchmark, bandwidth, device):
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (256, 9, 84, 84), dtype=torch.uint8, generator=generator).to(device)
    offsets = torch.randint(0, 9, (256, 2), generator=generator).to(device)
    ours = lambda: ops.random_shift(frames, offsets)  # noqa: E731
    peer = lambda: shift_of_drq(frames, offsets)  # noqa: E731
    torch.testing.assert_close(ours(), peer(), rtol=0, atol=1e-4)
    limit = (frames.nbytes + 4 * frames.nbytes) / bandwidth(device)
    race(benchmark, device, ours, {"DrQ-v2 pad + grid_sample": peer}, rounds=9, limit=limit)


# --- Sum tree


def torchrl_tree(priorities: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> Contender | str:
    device, count = priorities.device, priorities.numel()
    try:
        import torchrl
    except ImportError:
        return "not installed"
    try:
        from torchrl import _torchrl as extension
    except ImportError:
        return f"the extension of {torchrl.__version__} does not load with torch {torch.__version__}"
    if device.type == "cpu":
        tree = extension.SumSegmentTreeFp32(count)
    elif hasattr(extension, "CudaSumSegmentTreeFp32"):
        tree = extension.CudaSumSegmentTreeFp32(count, device)
    else:
        return f"this build of {torchrl.__version__} has no CUDA tree"
    tree[torch.arange(count, device=device)] = priorities

    def update_and_sample():
        tree[indices] = values
        mass = torch.rand(indices.numel(), device=device) * tree.query(0, count)
        return tree.scan_lower_bound(mass)

    return update_and_sample


@pytest.mark.parametrize("device", DEVICES)
def test_sum_tree(benchmark, device):
    generator = torch.Generator().manual_seed(0)
    priorities = torch.rand(1_000_000, generator=generator).add(0.01).to(device)
    indices = torch.randint(0, 1_000_000, (256,), generator=generator).to(device)
    values = torch.rand(256, generator=generator).to(device)
    tree = ops.SumTree(1_000_000, device)
    tree.update(torch.arange(1_000_000, device=device), priorities)
    assert tree.total == pytest.approx(priorities.double().sum().item(), rel=1e-12)

    def ours():
        tree.update(indices, values)
        return tree.sample(256)

    def cumulative():
        priorities[indices] = values
        total = priorities.cumsum(0)
        return torch.searchsorted(total, torch.rand(256, device=device) * total[-1])

    peers = {"cumsum + searchsorted": cumulative, "torchrl": torchrl_tree(priorities, indices, values)}
    race(benchmark, device, ours, peers, rounds=50)


# --- The table


def table(path: Path) -> str:
    """The results of one run as Markdown, every row with every contender."""
    lines = [
        "| row | device | ours | of the limit | against | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for entry in json.loads(path.read_text())["benchmarks"]:
        info = entry["extra_info"]
        times = dict(info["seconds"])
        ours = times.pop("ours")
        fraction = f"{info['limit'] / ours:.0%}" if info.get("limit") else "-"
        if info.get("operations"):
            fraction += f", {info['operations'] / ours / 1e12:.3g} TFLOP/s"
        if info.get("peak_extra_bytes"):
            extra = info["peak_extra_bytes"] - info["gradient_bytes"]
            fraction += f", {extra / 2**20:.0f} MiB beyond the gradients"
        versus = [(name, _duration(value), f"{value / ours:.2f}x") for name, value in times.items()]
        versus += [(name, why, "not measured") for name, why in info["unavailable"].items()]
        for name, value, ratio in versus or [("-", "", "-")]:
            name_and_time = f"{name}: {value}" if value else name
            row = entry["name"].removeprefix("test_")
            lines.append(
                f"| {row} | {info['device']} | {_duration(ours)} | {fraction} | {name_and_time} | {ratio} |"
            )
    return "\n".join(lines)


def _duration(value: float) -> str:
    return f"{value * 1e6:.1f} us" if value < 1e-3 else f"{value * 1e3:.2f} ms"


def main() -> int:
    path = Path(sys.argv[1])
    status = pytest.main([__file__, "-q", "-p", "no:cacheprovider", f"--benchmark-json={path}"])
    if status == 0:
        path.with_suffix(".md").write_text(table(path) + "\n")
    return int(status)


if __name__ == "__main__":
    raise SystemExit(main())
