"""The captured update equals the eager one: its bookkeeping anywhere, the graph itself on a GPU."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from small_agents import (
    KINDS,
    SHAPE,
    SMALL,
    asked,
    assert_same,
    assert_steady,
    batch_of,
    captured_agent,
    eager_agent,
    make_batch,
    prioritized_buffer,
    small_agent,
    small_buffer,
)  # fmt: skip
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from covr_fast import ReplayBuffer
from covr_fast.agents import SAC, sac
from covr_fast.logger import MeanMetrics


def test_fifty_updates_are_those_of_the_eager_agent():
    """Guidance begins after 20 of them, and is off again for a while, so that both graphs come back."""
    eager, captured = eager_agent(), captured_agent()
    expected, got = [], []
    for step in range(50):
        guide = 20 <= step < 35 or step >= 40
        expected.append(eager.update(make_batch(step), guide=guide))
        batch = make_batch(step)
        if not guide:
            batch.extras = {}  # not read
        got.append(captured.update(batch, guide=guide))
        if step % 7 == 0:  # acting draws from the same generator
            obs = torch.randint(0, 256, (2, *SHAPE), dtype=torch.uint8)
            assert torch.equal(eager.act(obs), captured.act(obs))
    assert_same(eager, captured)
    assert asked(captured).count("capture") == 2
    assert asked(captured).count("aside") == 6
    for step, (a, b) in enumerate(zip(expected, got, strict=True)):  # later updates left earlier metrics be
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a), step


def test_loading_a_state_drops_the_graphs_and_goes_on_bit_for_bit():
    eager, first, second = eager_agent(1), captured_agent(1), captured_agent(2)
    for step in range(8):
        eager.update(make_batch(step), guide=True)
        first.update(make_batch(step), guide=True)
        second.update(make_batch(99 - step), guide=True)
    state = first.state_dict()
    first.update(make_batch(50), guide=True)  # changes nothing in the copy
    for agent in (first, second):
        agent.load_state_dict(state)
        before = len(asked(agent))
        for step in range(8, 20):
            agent.update(make_batch(step), guide=step % 2 == 0)
        assert asked(agent)[before:].count("capture") == 2
    for step in range(8, 20):
        eager.update(make_batch(step), guide=step % 2 == 0)
    assert_same(eager, first)
    assert_same(eager, second)


def test_a_state_saved_by_a_captured_agent_loads_into_an_eager_one():
    agent, other = eager_agent(), eager_agent(3)
    agent.update(make_batch(0), guide=False)
    state = agent.state_dict()
    for name in agent.optimizers():
        for group in state[name]["param_groups"]:
            group["capturable"] = True  # as on a GPU with agent.graph
    other.load_state_dict(state)
    for optimizer in other.optimizers().values():
        assert not any(group["capturable"] for group in optimizer.param_groups)
    agent.update(make_batch(1), guide=False)
    other.update(make_batch(1), guide=False)
    assert_same(agent, other)


def test_another_batch_size_is_refused():
    agent = captured_agent()
    agent.update(make_batch(0), guide=False)
    with pytest.raises(ValueError, match=r"obs is float32\[5, 3, 12, 12\] on cpu, captured was float32\[6"):
        agent.update(make_batch(1, n=5), guide=False)


def test_the_option_does_nothing_on_a_cpu():
    plain, asking = eager_agent(), SAC(SHAPE, (2,), replace(SMALL, graph=True))
    for step in range(3):
        plain.update(make_batch(step), guide=True)
        asking.update(make_batch(step), guide=True)
    assert_same(plain, asking)


def test_prioritized_replay_and_logged_means_see_the_same_numbers():
    drawn, means = [], []
    for agent in (eager_agent(), captured_agent()):
        buffer, logged = prioritized_buffer(), MeanMetrics()
        indices = []
        for _ in range(30):
            batch = buffer.sample(8)
            metrics = agent.update(batch, guide=True)
            buffer.update_priorities(batch.index, metrics["td_error"])
            logged.add(metrics)
            indices.append(batch.index)
        drawn.append(torch.stack(indices))
        means.append(logged.read())
    assert torch.equal(*drawn)
    assert means[0] == means[1]


@pytest.mark.parametrize("sampler", ["uniform", "prioritized"])
def test_drawing_inside_the_graph_changes_no_number(sampler):
    """Eager draws and updates in between take their places in the sequence."""
    agents, buffers = (eager_agent(), captured_agent()), [small_buffer(sampler) for _ in range(2)]
    eager, captured = sources = [buffer.sampling(8, augment="shift") for buffer in buffers]
    assert not agents[0].draws_from(eager)
    assert agents[1].draws_from(captured)
    for step in range(30):
        got = [a.update_from(s, guide=step >= 12) for a, s in zip(agents, sources, strict=True)]
        assert all(torch.equal(got[0][name], got[1][name]) for name in got[0])
        if step % 7 == 0:
            drawn = [buffer.sample(3).index for buffer in buffers]
            assert torch.equal(*drawn)
    assert_same(*agents)
    assert asked(agents[1]) == (["aside"] * 3 + ["capture"] + ["replay"] * 9) + (
        ["aside"] * 3 + ["capture"] + ["replay"] * 15
    )


def test_drawing_from_an_empty_buffer_is_an_error_and_changes_nothing():
    agent, other = captured_agent(), eager_agent()
    buffer = ReplayBuffer(8, num_envs=1, obs_shape=SHAPE, action_shape=(2,))
    with pytest.raises(IndexError, match="nothing to sample"):
        agent.update_from(buffer.sampling(4), guide=False)
    assert_same(agent, other)


def test_an_agent_and_its_graphs_are_freed_without_the_garbage_collector():
    for agent in captured_agent(), captured_agent():  # the first update of a process makes garbage of torch's
        for step in range(6):
            agent.update(make_batch(step), guide=False)
    gone = weakref.ref(agent.encoder)
    gc.disable()
    try:
        del agent
        assert gone() is None
    finally:
        gc.enable()


READS = {
    "_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "bincount",
    "unique_consecutive", "_unique2", "unique_dim", "repeat_interleave",
}  # fmt: skip
SENDS = {"lift_fresh", "scalar_tensor"}  # torch.tensor(...) of Python values
METHODS = ("tolist", "numpy", "cpu", "cuda")  # of a CPU tensor they need no operation


class NoSynchronisation(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU, or send it something, if the tensors were there."""

    def __init__(self):
        super().__init__()
        self.seen = set()
        self._patch = pytest.MonkeyPatch()

    def __enter__(self):
        def refuse(name):
            raise AssertionError(f"{name}() would synchronise")

        for name in METHODS:
            self._patch.setattr(torch.Tensor, name, lambda *_, name=name: refuse(name))
        return super().__enter__()

    def __exit__(self, *error):
        self._patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = op.overloadpacket.__name__
        self.seen.add(name)
        masked = name in ("index", "index_put", "index_put_") and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1])
        )
        if name in READS | SENDS or masked:
            raise AssertionError(f"{name} would synchronise")
        if name == "_to_copy" and kwargs.get("device") is not None:
            raise AssertionError("a copy between devices")
        return op(*args, **kwargs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guide", [False, True])
def test_an_update_never_synchronises(guide, kind, monkeypatch):
    # On a CPU the shift reads its offsets to check them, on a GPU it does not.
    monkeypatch.setattr(sac, "random_shift", lambda frames, offsets, pad, *, dtype: frames.to(dtype) / 255)
    agent = small_agent(kind)
    batches = [batch_of(kind, step) for step in range(2)]
    with NoSynchronisation() as watch:
        for batch in batches:  # the first makes the optimizers' state
            agent.update(batch, guide=guide)
    assert {"convolution", "convolution_backward", "_fused_adam_", "_foreach_lerp_"} <= watch.seen


@pytest.mark.parametrize(
    "sin",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.tensor([1.0, 2.0]),
        lambda x: x.to(torch.device("meta")),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
    ],
)
def test_the_watch_sees_synchronisation(sin):
    x = torch.ones(3)
    with NoSynchronisation(), pytest.raises(AssertionError, match=r"synchronise|between devices"):
        sin(x)


# ---------------------------------------------------------------------- on a GPU


def cuda_agents(**changes):
    """An eager and a captured agent with the same weights and noise."""
    configs = (replace(SMALL, graph=graph, **changes) for graph in (False, True))
    return [SAC(SHAPE, (2,), config, device="cuda") for config in configs]


@pytest.fixture
def deterministic_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.mark.needs_cuda
def test_cuda_graph_equals_eager(deterministic_convolutions):
    eager, captured = cuda_agents()
    for step in range(20):
        batch, guide = make_batch(step, device="cuda"), step >= 10
        expected, got = (agent.update(batch, guide=guide) for agent in (eager, captured))
        assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(eager.generator.get_state(), captured.generator.get_state())
    for name, module in eager.modules().items():
        assert_close(captured.modules()[name].state_dict(), module.state_dict(), rtol=1e-3, atol=1e-4)


@pytest.mark.needs_cuda
def test_cuda_graph_reads_the_prior_s_weight_of_the_moment(deterministic_convolutions):
    eager, captured = cuda_agents()
    for step in range(20):
        batch = make_batch(step, device="cuda")
        for agent in (eager, captured):
            agent.weigh_prior(5.0 * (step % 3))
        expected, got = (agent.update(batch, guide=True) for agent in (eager, captured))
        assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.needs_cuda
def test_cuda_graph_replays_draw_new_noise():
    """The same batch, without learning: only the noise differs between two replays."""
    _, agent = cuda_agents(lr=0.0, alpha_lr=0.0, tau=1e-12)
    batch = make_batch(0, device="cuda")
    entropies = [agent.update(batch, guide=False)["entropy"].item() for _ in range(10)]
    assert len(set(entropies)) == len(entropies)


@pytest.mark.needs_cuda
def test_cuda_graph_in_steady_state_neither_synchronises_nor_allocates():
    _, agent = cuda_agents()
    assert_steady(agent)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("sampler", ["uniform", "prioritized"])
def test_cuda_graph_draws_the_batches_that_the_cpu_draws(sampler, deterministic_convolutions):
    eager, captured = cuda_agents()
    on_cpu, on_gpu = small_buffer(sampler), small_buffer(sampler, device="cuda")
    source = on_gpu.sampling(8, augment="shift")
    for step in range(20):
        batch, guide = on_cpu.sample(8, augment="shift"), step >= 10
        expected, got = eager.update(batch.to("cuda"), guide=guide), captured.update_from(source, guide=guide)
        assert_close(got, expected, rtol=1e-3, atol=1e-4)
        if sampler == "prioritized":
            on_cpu.update_priorities(batch.index, got["td_error"])
        else:
            assert torch.equal(source.batch.index.cpu(), batch.index)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("sampler", ["uniform", "prioritized"])
def test_cuda_sampling_and_updating_in_one_graph_neither_synchronises_nor_allocates(sampler):
    _, agent = cuda_agents()
    source = small_buffer(sampler, device="cuda").sampling(8, augment="shift")
    for step in range(16):
        agent.update_from(source, guide=step >= 8)
    gc.collect()  # or what earlier tests left would be freed meanwhile
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(1000):
            agent.update_from(source, guide=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after = torch.cuda.memory_stats()
    # What was on its way to be freed when the loop began is freed in it.
    assert before["allocated_bytes.all.current"] >= after["allocated_bytes.all.current"]
    assert before["num_device_alloc"] == after["num_device_alloc"]


@pytest.mark.needs_cuda
def test_cuda_eager_update_does_not_synchronise():
    agent, _ = cuda_agents()
    batch = make_batch(0, device="cuda")
    agent.update(batch, guide=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        agent.update(batch, guide=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.needs_cuda
def test_cuda_graph_goes_on_from_a_checkpoint(deterministic_convolutions, tmp_path):
    eager, captured = cuda_agents()
    for step in range(8):
        for agent in (eager, captured):
            agent.update(make_batch(step, device="cuda"), guide=True)
    torch.save(captured.state_dict(), tmp_path / "agent.pt")
    state = torch.load(tmp_path / "agent.pt", map_location="cpu", weights_only=True)
    captured.update(make_batch(50, device="cuda"), guide=True)
    captured.load_state_dict(state)
    for step in range(8, 16):
        batch = make_batch(step, device="cuda")
        expected, got = (agent.update(batch, guide=True) for agent in (eager, captured))
        assert_close(got["q"], expected["q"], rtol=1e-3, atol=1e-4)
    on_cpu = eager_agent(7)
    on_cpu.load_state_dict(state)
    on_cpu.update(make_batch(0), guide=True)
