"""One small call of every kernel, against its reference: does this machine run them at all?

    python benchmarks/gpu/smoke.py --device cuda [CHECK ...]

Each check has a process of its own, since an illegal access leaves a process without its device, and all
run at once. Prints a line for each; exits with 1 if any failed, or took longer than --seconds.
"""

import argparse
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import get_args

import numpy as np
import torch

from covr_fast import ReplayBuffer, ops
from covr_fast.agents import SAC, AgentConfig, Kind, agent_config, make_agent

Check = Callable[[str], object]
CHECKS: dict[str, Check] = {}


def check(name: str) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return register


def random(device: str, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


@check("returns")
def returns(device: str) -> None:
    for shape in ((1, 1), (50, 10), (1000, 33)):
        rewards = torch.randn(shape, generator=random(device), device=device)
        ends = torch.rand(shape, generator=random(device), device=device) < 0.05
        found = ops.discounted_returns(rewards, ends, 0.99)
        truth = ops.discounted_returns(rewards.double(), ends, 0.99, backend="reference").float()
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)


@check("filter")
def exploration_filter(device: str) -> None:
    for count in (1, 7, 5000, 100_003):
        values = torch.randn(count, generator=random(device), device=device)
        found = ops.exploration_filter(values, 0.7).indices
        truth = ops.exploration_filter(values.double(), 0.7, backend="reference").indices
        assert len(set(found.tolist()) ^ set(truth.tolist())) <= 2, f"of {count}: others are kept"


@check("weights")
def weights(device: str) -> None:
    for count in (1, 7, 100_003):
        values = torch.randn(count, generator=random(device), device=device)
        truth = ops.return_weights(values, backend="reference")
        torch.testing.assert_close(ops.return_weights(values), truth, rtol=0, atol=1e-5)


@check("frames")
def frames(device: str) -> None:
    images = torch.randint(0, 256, (5, 9, 31, 20), dtype=torch.uint8, generator=random(device), device=device)
    offsets = torch.randint(0, 9, (5, 2), generator=random(device), device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        truth = ops.random_shift(images, offsets, dtype=dtype, backend="reference")
        torch.testing.assert_close(ops.random_shift(images, offsets, dtype=dtype), truth)


@check("sum tree")
def sum_tree(device: str) -> None:
    for capacity in (1, 33, 5000):
        tree = ops.SumTree(capacity, device)
        indices = torch.randint(0, capacity, (300,), generator=random(device), device=device)
        tree.update(indices, torch.rand(300, generator=random(device), device=device) + 0.1)
        assert abs(tree.total - tree.priorities.double().sum().item()) < 1e-6 * tree.total
        drawn, probabilities = tree.sample(256)
        expected = tree.priorities[drawn].double() / tree.total
        torch.testing.assert_close(probabilities, expected, rtol=1e-6, atol=0)


def losses(device: str) -> Iterator[tuple[torch.dtype, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Hidden states in each dtype, labels and weights."""
    for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
        hidden = torch.randn(4, 9, 32, generator=random(device), device=device).to(dtype)
        labels = torch.randint(0, 1003, (4, 9), generator=random(device), device=device)
        labels[0, :3] = -100
        yield dtype, hidden, labels, torch.tensor([1.0, 0.0, 0.5, 0.25], device=device)


def same_loss(call: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> None:
    """The fast call's value and gradients against those of the reference in float64."""
    results = []
    for backend, dtype in (("auto", inputs[0].dtype), ("reference", torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        loss = call(*leaves, backend=backend)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    tolerance = 1e-4 if inputs[0].dtype == torch.float32 else 3e-2
    for found, truth in zip(*results, strict=True):
        error = (found.double() - truth.double()).norm() / truth.double().norm()
        assert error < tolerance, f"{inputs[0].dtype}: off by {error:.2g}"


@check("cross-entropy")
def cross_entropy(device: str) -> None:
    for dtype, _, labels, row_weights in losses(device):
        logits = torch.randn(4, 9, 1003, generator=random(device), device=device).to(dtype)

        def call(logits: torch.Tensor, backend: str, rest=(labels, row_weights)) -> torch.Tensor:
            return ops.return_weighted_cross_entropy(logits, *rest, label_smoothing=0.1, backend=backend)

        same_loss(call, logits)


@check("linear cross-entropy")
def linear_cross_entropy(device: str) -> None:
    for dtype, hidden, labels, row_weights in losses(device):
        head = (torch.randn(1003, 32, generator=random(device), device=device) / 6).to(dtype)

        def call(hidden, head, backend: str, rest=(labels, row_weights)) -> torch.Tensor:
            return ops.return_weighted_linear_cross_entropy(
                hidden, head, *rest, label_smoothing=0.1, backend=backend
            )

        same_loss(call, hidden, head)


def replay(device: str, rows_on_device: bool = False, size=(21, 18), **options) -> ReplayBuffer:
    """Four streams of short episodes."""
    buffer = ReplayBuffer(
        200, num_envs=4, obs_shape=(9, *size), action_shape=(2,), frame_stack=3, n_step=2, seed=0,
        device=device, **options,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (75, 4, 3, *size), dtype=np.uint8)
    for t in range(70):
        stacks = [np.concatenate(images[t + k : t + k + 3], axis=1) for k in (0, 1)]
        action, ended = rng.uniform(-1, 1, (4, 2)).astype(np.float32), np.full(4, t % 7 == 6)
        rows = (stacks[0], action, np.full(4, t, np.float32), stacks[1], ended & (t % 2 == 0), ended)
        buffer.add(*(torch.as_tensor(row, device=device) for row in rows) if rows_on_device else rows)
    return buffer


@check("gather")
def gather(device: str) -> None:
    """The same draws as on the CPU, the same pixels."""
    for storage in ("device", "pinned") if device == "cuda" else ("device",):
        ours, truth = replay(device, storage=storage), replay("cpu")
        for dtype in (torch.uint8, torch.float32, torch.bfloat16):
            for augment in (None, "shift", "crop", "translate"):
                for memory_format in (torch.contiguous_format, torch.channels_last):
                    options = {"dtype": dtype, "augment": augment, "memory_format": memory_format}
                    found, expected = (buffer.sample(64, **options) for buffer in (ours, truth))
                    for name in ("obs", "next_obs", "reward", "discount", "action"):
                        given, wanted = getattr(found, name).cpu(), getattr(expected, name)
                        assert torch.equal(given, wanted), f"{storage}, {options}: {name} differ"


@check("draws")
def draws(device: str) -> None:
    """Also after new priorities, and of rows that were added in device memory: those of the CPU."""
    for sampler in ("uniform", "recent", "prioritized"):
        for rows_on_device in (False, True):
            ours, truth = replay(device, rows_on_device, sampler=sampler), replay("cpu", sampler=sampler)
            for step in range(5):
                found, expected = (buffer.sample(64, augment="shift") for buffer in (ours, truth))
                for name in ("index", "obs", "next_obs", "reward"):
                    given, wanted = getattr(found, name).cpu(), getattr(expected, name)
                    assert torch.equal(given, wanted), f"{sampler}, {rows_on_device=}: {name} differ"
                torch.testing.assert_close(found.weight.cpu(), expected.weight)
                if sampler == "prioritized":
                    priority = torch.rand(64, generator=random("cpu", step))
                    ours.update_priorities(found.index, priority.to(device))
                    truth.update_priorities(expected.index, priority)
            assert len(ours) == len(truth)


@check("update")
def update(device: str) -> None:
    """Eager and, on a GPU, as a graph: the same Q."""
    batch = replay(device).sample(16)
    kinds = [{"graph": False}, {"graph": True}] if device == "cuda" else [{}]
    values = []
    for options in kinds:
        config = AgentConfig(channels=(8, 8), strides=(2, 2), hidden=32, latent=16, **options)
        agent = SAC((9, 21, 18), (2,), config, device=device)
        for _ in range(10):
            metrics = agent.update(batch, guide=False)
        values.append(metrics["q"].item())
    assert np.allclose(values, values[0], rtol=1e-2, atol=1e-3), f"Q of eager and graph: {values}"


@check("sampling and update")
def sampled_update(device: str) -> None:
    """Eager and, on a GPU, as one graph: the same batches, the same Q."""
    kinds = [{}, {"graph": True}] if device == "cuda" else [{}]
    for sampler in ("uniform", "prioritized"):
        values, index = [], []
        for options in kinds:
            config = AgentConfig(channels=(8, 8), strides=(2, 2), hidden=32, latent=16, **options)
            agent = SAC((9, 21, 18), (2,), config, device=device)
            buffer = replay(device, sampler=sampler)
            source = buffer.sampling(16, augment="shift")
            for _ in range(10):
                metrics = agent.update_from(source, guide=False)
            values.append(metrics["q"].item())
            index.append(buffer.sample(16).index)  # number 11 of the sequence
        assert np.allclose(values, values[0], rtol=1e-2, atol=1e-3), (
            f"{sampler}: Q of eager and graph: {values}"
        )
        if sampler == "uniform":
            assert all(torch.equal(of_kind, index[0]) for of_kind in index), "the graph counts otherwise"


@check("published agents")
def published_agents(device: str) -> None:
    """Eager and, on a GPU, as graphs (with and without the actor's step): the same figures."""
    for kind in get_args(Kind):
        batch = replay(device, size=(42, 42)).sample(16, dtype=agent_config(kind).batch_form.dtype)
        figures = []
        for graph in (False, True) if device == "cuda" else (False,):
            agent = make_agent((9, 42, 42), (2,), replace(agent_config(kind), graph=graph), device=device)
            for _ in range(10):
                metrics = agent.update(batch, guide=False)
            figures.append({name: value.float().mean().item() for name, value in metrics.items()})
        for name, value in figures[0].items():
            assert np.allclose(figures[-1][name], value, rtol=2e-2, atol=1e-3), f"{kind}: {figures}"


@check("prior")
def prior(device: str) -> None:
    """The fast decode, on a GPU launched and replayed as a graph, in float32: generate()'s tokens."""
    from covr_fast.vlm import ActionPrior

    images = torch.randint(0, 256, (3, 3, 84, 84), dtype=torch.uint8, generator=random("cpu")).to(device)
    for graph in (False, True):
        asked = ActionPrior.from_pretrained(
            "nano", action_dim=2, device=device, dtype=torch.float32, graph=graph
        )
        for _ in range(3):  # the third call of a batch size records its graph and replays it
            answer = asked(images)
        assert torch.equal(answer.token_ids, asked.reference(images).token_ids), f"graph={graph}"


def run(name: str, device: str) -> None:
    torch.set_num_threads(1)
    begin = time.monotonic()
    try:
        CHECKS[name](device)
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception:
        print(f"{name}: FAILED\n{traceback.format_exc(limit=-3)}", flush=True)
        sys.exit(1)
    print(f"{name}: ok ({time.monotonic() - begin:.1f} s)", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "checks", nargs="*", metavar="CHECK", help=f"all if none is given: {', '.join(CHECKS)}"
    )
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    if unknown := set(arguments.checks) - set(CHECKS):
        parser.error(f"no checks: {', '.join(sorted(unknown))}")
    fork = multiprocessing.get_context("fork")  # torch is imported once, and has not touched the device yet
    names = arguments.checks or list(CHECKS)
    processes = {name: fork.Process(target=run, args=(name, arguments.device)) for name in names}
    for process in processes.values():
        process.start()
    end = time.monotonic() + arguments.seconds
    failed = []
    for name, process in processes.items():
        process.join(max(0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            print(f"{name}: FAILED, ended after {arguments.seconds:.0f} s", flush=True)
        elif process.exitcode and process.exitcode < 0:
            print(f"{name}: FAILED, ended by signal {-process.exitcode}", flush=True)
        if process.exitcode != 0:
            failed.append(name)
    print(
        f"FAILED: {', '.join(failed)}" if failed else f"{len(processes)} kinds of kernels run and are right"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
