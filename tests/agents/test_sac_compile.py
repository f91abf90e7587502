"""The compiled update equals the eager one: whole graphs that serve every step, on the CPU by inductor's own
code, on a GPU inside a CUDA graph too."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from fake_graphs import FakeGraphs
from small_agents import (
    SHAPE,
    SMALL,
    asked,
    assert_same,
    assert_steady,
    eager_agent,
    make_batch,
    prioritized_buffer,
)  # fmt: skip
from torch._dynamo.utils import counters
from torch.testing import assert_close

from covr_fast.agents import SAC
from covr_fast.agents.captured import CapturedUpdate
from covr_fast.errors import UserError

GRAPHS = 3  # the critic's loss, the policy's with guidance, and without


pytestmark = pytest.mark.usefixtures("nothing_compiled_yet")


def compiled_agent(seed=0, **changes):
    return SAC(SHAPE, (2,), replace(SMALL, compile=True, **changes), seed=seed)


def situations(steps, start=0):
    """(batch, guide) as a run's cold start, priors and prioritized replay make them."""
    for step in range(start, start + steps):
        batch, guide = make_batch(step), step % 4 > 1
        batch.extras["prior_mask"] = (torch.arange(6) < step % 7).float()  # from none to all
        if step % 8 == 2:
            batch.extras["prior_mask"].zero_()
        if step % 4 == 0:
            batch.extras = {}
        if step % 4 == 1:
            batch.extras["prior"].fill_(torch.nan)
        yield batch, guide


@pytest.mark.slow
def test_inductor_computes_the_updates_of_the_eager_agent():
    eager, compiled = eager_agent(), compiled_agent()
    for step, (batch, guide) in enumerate(situations(12)):
        expected, got = eager.update(batch, guide=guide), compiled.update(batch, guide=guide)
        assert_close(expected, got, rtol=1e-4, atol=1e-5)
        if step % 3 == 0:  # acting draws from the same generator
            obs = torch.randint(0, 256, (2, *SHAPE), dtype=torch.uint8)
            assert_close(compiled.act(obs), eager.act(obs), rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == GRAPHS
    assert counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"] > 0
    # Parameters, temperature, and both of Adam's moments; the generator's state is the same bit for bit.
    assert_close(eager.state_dict(), compiled.state_dict(), rtol=1e-3, atol=2e-5)


def test_three_whole_graphs_serve_every_step(traced_only):
    eager, compiled = eager_agent(), compiled_agent()
    for step, (batch, guide) in enumerate(situations(24)):
        with torch._dynamo.config.patch(error_on_recompile=step >= 4):  # the first four compile all there is
            got = compiled.update(batch, guide=guide)
        assert_close(eager.update(batch, guide=guide), got, rtol=1e-5, atol=1e-6)
        if step == 12:
            compiled.load_state_dict(compiled.state_dict())  # Adam's moments are others now
    assert counters["stats"]["unique_graphs"] == GRAPHS
    assert not counters["graph_break"]
    assert_close(eager.state_dict(), compiled.state_dict(), rtol=1e-5, atol=1e-6)


def test_batches_of_the_replay_buffer_are_compiled_for_once(traced_only):
    buffer, eager, compiled = prioritized_buffer(), eager_agent(), compiled_agent()
    for step in range(6):
        batch = buffer.sample(8, memory_format=torch.channels_last)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            got = compiled.update(batch, guide=True)
        assert_close(eager.update(batch, guide=True), got, rtol=1e-5, atol=1e-6)
        buffer.update_priorities(batch.index, got["td_error"])
    assert counters["stats"]["unique_graphs"] == GRAPHS - 1


def test_a_captured_update_may_be_compiled(traced_only):
    """The recording comes after the calls that compile: each of guidance and none warms up by itself."""
    plain, both = compiled_agent(), compiled_agent()
    both._captured = CapturedUpdate(both._update, FakeGraphs())
    for step in range(20):
        batch, guide = make_batch(step), 5 <= step < 14
        before = counters["stats"]["unique_graphs"], len(asked(both))
        expected, got = plain.update(batch, guide=guide), both.update(batch, guide=guide)
        assert_close(expected, got, rtol=1e-5, atol=1e-6)
        if "aside" not in asked(both)[before[1] :]:
            assert counters["stats"]["unique_graphs"] == before[0]
    assert asked(both).count("capture") == 2
    assert_same(plain, both)


def test_a_deep_copy_learns_by_itself(traced_only):
    eager, compiled = eager_agent(), compiled_agent()
    eager.update(make_batch(0), guide=True)
    compiled.update(make_batch(0), guide=True)
    before, copy = compiled.state_dict(), deepcopy(compiled)
    for step in range(1, 4):
        eager.update(make_batch(step), guide=True)
        copy.update(make_batch(step), guide=True)
    assert_close(before, compiled.state_dict(), rtol=0, atol=0)
    assert_close(eager.state_dict(), copy.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("saved, loaded", [(False, True), (True, False)])
def test_a_state_goes_from_one_kind_of_agent_to_the_other(saved, loaded, traced_only, tmp_path):
    agents = {True: compiled_agent, False: eager_agent}
    first, second = agents[saved](1), agents[loaded](2)
    for step in range(3):
        first.update(make_batch(step), guide=True)
        second.update(make_batch(9 - step), guide=True)
    torch.save(first.state_dict(), tmp_path / "agent.pt")
    second.load_state_dict(torch.load(tmp_path / "agent.pt", weights_only=True))
    assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)  # the same keys, too
    for step in range(3, 6):
        first.update(make_batch(step), guide=True)
        second.update(make_batch(step), guide=True)
    assert_close(first.state_dict(), second.state_dict(), rtol=1e-5, atol=1e-6)


def test_without_a_compiler_the_option_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing that was compiled before
    agent, batch = compiled_agent(), make_batch(0)
    said = r"agent\.compile: torch cannot compile here .*no-such-compiler.*g\+\+"
    missing = torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with missing, pytest.raises(UserError, match=said):
        agent.update(batch, guide=False)


# ---------------------------------------------------------------------- on a GPU


def cuda_agent(**changes):
    return SAC(SHAPE, (2,), replace(SMALL, **changes), device="cuda")


@pytest.mark.needs_cuda
@pytest.mark.parametrize("graph", [False, True])
def test_cuda_compiled_equals_eager(graph, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    eager, compiled = cuda_agent(), cuda_agent(compile=True, graph=graph)
    for step in range(20):
        batch, guide = make_batch(step, device="cuda"), step >= 10
        expected, got = eager.update(batch, guide=guide), compiled.update(batch, guide=guide)
        assert_close(expected, got, rtol=1e-3, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == GRAPHS
    assert torch.equal(eager.generator.get_state(), compiled.generator.get_state())
    for name, module in eager.modules().items():
        assert_close(module.state_dict(), compiled.modules()[name].state_dict(), rtol=1e-3, atol=1e-4)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("graph", [False, True])
def test_cuda_compiled_in_steady_state_neither_synchronises_nor_allocates(graph):
    assert_steady(cuda_agent(compile=True, graph=graph))
