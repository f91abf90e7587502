"""Every kind of agent: its networks as published, its settings, its state, and that it runs in every way."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from fake_graphs import FakeGraphs
from small_agents import KINDS, SHAPE, assert_same, batch_of, make_batch, small_agent

from covr_fast import SAC, DrQV2
from covr_fast.agents import AgentConfig, agent_config, make_agent
from covr_fast.agents.captured import CapturedUpdate
from covr_fast.agents.config import ignored
from covr_fast.errors import UserError

WITH_TARGET_ENCODER = ("sac", "rad", "drq", "deepmdp")

# ---- networks ------------------------------------------------------------------------------------------


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("kind", "size", "side"), [
    *((kind, 84, 35) for kind in KINDS if kind != "fast"), ("rad", 108, 47), ("fast", 84, 15),
])  # fmt: skip
def test_networks_have_the_published_sizes(kind, size, side):
    agent = make_agent((9, size, size), (6,), agent_config(kind))
    encoder = agent.encoder[0] if kind == "fast" else agent.encoder
    assert encoder.map_shape == (32, side, side)
    convolutions = 32 * 9 * (25 if kind == "fast" else 9) + 3 * 32 * 32 * 9 + 4 * 32
    trunk = 32 * side * side * 50 + 3 * 50  # with LayerNorm's two
    q = (56 * 1024 + 1024) + (1024 * 1024 + 1024) + (1024 + 1)
    outputs = 6 if kind == "drqv2" else 12
    policy = (50 * 1024 + 1024) + (1024 * 1024 + 1024) + (1024 + 1) * outputs
    if kind == "fast":  # one trunk for both
        assert (count(agent.encoder), count(agent.critic), count(agent.actor)) == (
            convolutions + trunk, 2 * q, policy,
        )  # fmt: skip
    else:
        assert (count(agent.encoder), count(agent.critic), count(agent.actor)) == (
            convolutions, trunk + 2 * q, trunk + policy,
        )  # fmt: skip
    assert count(agent.critic_target) == count(agent.critic)
    assert ("encoder_target" in agent.modules()) == (kind in WITH_TARGET_ENCODER)
    if kind == "deepmdp":
        layer = 56 * 512 + 512 + 2 * 512
        assert count(agent.models) == 2 * layer + (512 * 50 + 50) + (512 + 1)


def assert_orthogonal(rows, gain):
    short = rows if rows.shape[0] <= rows.shape[1] else rows.T
    torch.testing.assert_close(short @ short.T, gain**2 * torch.eye(len(short)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fast"])
def test_weights_begin_as_published(kind):
    agent = small_agent(kind)
    for layer in agent.encoder.layers[::2]:
        weight = layer.weight.detach()
        if kind.startswith("drq"):
            assert_orthogonal(weight.flatten(1), 2**0.5)
        else:  # nothing but the centre
            assert_orthogonal(weight[:, :, 1, 1], 2**0.5)
            assert weight.abs().sum() == weight[:, :, 1, 1].abs().sum()
        assert not layer.bias.any()
    linear = [agent.actor.trunk.linear, agent.critic.trunk.linear, agent.critic.q2[0], agent.actor.net[4]]
    for layer in linear:
        assert_orthogonal(layer.weight.detach(), 1.0)
        assert not layer.bias.any()
    for name in ("encoder", "critic"):
        if f"{name}_target" in agent.modules():
            online, target = agent.modules()[name], agent.modules()[f"{name}_target"]
            assert all(
                torch.equal(a, b) for a, b in zip(online.parameters(), target.parameters(), strict=True)
            )


@pytest.mark.parametrize("kind", KINDS)
def test_the_actors_step_leaves_encoder_and_critic_alone(kind):
    agent = small_agent(kind)
    features = agent.encoder(make_batch().obs).detach()
    names = [name for name in agent.modules() if name != "actor"]
    before = [p.clone() for name in names for p in agent.modules()[name].parameters()]
    actor = [p.clone() for p in agent.actor.parameters()]
    agent.update_actor(features, make_batch(), guide=True)
    after = [p for name in names for p in agent.modules()[name].parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(actor, agent.actor.parameters(), strict=True))


# ---- the noise of DrQ-v2 -------------------------------------------------------------------------------


def test_noise_follows_the_schedule():
    agent = small_agent("drqv2", std_decisions=1000)
    for decisions, std in ((0, 1.0), (500, 0.55), (1000, 0.1), (5000, 0.1)):
        agent.observe_decisions(decisions)
        assert agent.std.item() == pytest.approx(std)
        entropy = torch.distributions.Normal(torch.zeros(2), agent.std).entropy().sum()
        torch.testing.assert_close(agent.entropy(torch.zeros(4, *SHAPE, dtype=torch.uint8)), entropy)


def test_exploration_is_noise_around_the_mean_within_the_bounds():
    obs = torch.randint(0, 256, (1, *SHAPE), dtype=torch.uint8).expand(4000, -1, -1, -1)
    agent = small_agent("drqv2")
    agent.observe_decisions(100_000)
    mean, explored = agent.act(obs, explore=False), agent.act(obs)
    assert torch.equal(agent.act(obs, explore=False), mean)
    free = explored[explored.abs() < 0.99] - mean[explored.abs() < 0.99]
    assert free.std().item() == pytest.approx(0.1, rel=0.1)
    agent.observe_decisions(0)
    explored = agent.act(obs)
    assert explored.abs().max() < 1
    assert (explored.abs() > 0.999).float().mean() > 0.1


# ---- settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("fast",)])
def test_a_kind_alone_is_no_agent(kind):
    """AgentConfig(kind="rad") would have the numbers of `fast`."""
    with pytest.raises(UserError, match=rf"agent_config\('{kind}'\)"):
        make_agent(SHAPE, (2,), AgentConfig(kind=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_fields_that_a_kind_does_not_read_are_refused(kind):
    agent_config(kind).check()
    assert ignored(kind)
    for name in ignored(kind):
        value = getattr(AgentConfig(), name)
        other = 0.5 if value is None else value + 1
        with pytest.raises(UserError, match=rf"agent\.{name}=.* no meaning for agent\.kind='{kind}'"):
            replace(agent_config(kind), **{name: other}).check()


@pytest.mark.parametrize(("change", "said"), [
    ({"kind": "ppo"}, "agent.kind"),
    ({"channels": (8,)}, "same length"),
    ({"actor_every": 0}, r"agent\.actor_every=0 must be at least 1"),
    ({"encoder_tau": 0.0}, r"agent\.encoder_tau=0\.0 must lie in"),
    ({"log_std_min": 3.0}, r"agent\.log_std_min=3\.0 must be below"),
])  # fmt: skip
def test_wrong_settings_are_named(change, said):
    with pytest.raises(UserError, match=said):
        replace(agent_config("rad"), **change).check()


def test_unknown_kinds_get_suggestions():
    with pytest.raises(UserError, match="drqv2"):
        agent_config("drqv3")


@pytest.mark.parametrize(("cls", "kind"), [(SAC, "drqv2"), (DrQV2, "rad")])
def test_a_class_refuses_the_kinds_of_the_other(cls, kind):
    with pytest.raises(UserError, match="make_agent"):
        cls(SHAPE, (2,), agent_config(kind))


def test_drq_wants_bytes():
    with pytest.raises(ValueError, match=r"batch\.obs is torch\.float32.*dtype=torch\.uint8"):
        small_agent("drq").update(make_batch(), guide=False)


def test_the_actor_is_updated_every_second_time_in_the_published_order():
    agent = small_agent("rad")
    for step in range(4):
        metrics = agent.update(make_batch(step), guide=True)
        assert ("actor_loss" in metrics) == ("prior_loss" in metrics) == (step % 2 == 0)


# ---- state, graphs, compiled code ----------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "before"), list(product(KINDS, (1, 2))))
def test_a_state_dict_continues_bit_for_bit(kind, before):
    """Also where the next update is one without the actor's step."""
    first, second = small_agent(kind, 3), small_agent(kind, 4)
    first.observe_decisions(7000)
    for step in range(before):
        first.update(batch_of(kind, step), guide=True)
    state = first.state_dict()
    second.load_state_dict(state)
    for step in range(3):
        for agent in (first, second):
            agent.update(batch_of(kind, 10 + step), guide=True)
    assert_same(first, second)
    obs = torch.randint(0, 256, (2, *SHAPE), dtype=torch.uint8)
    assert torch.equal(first.act(obs), second.act(obs))
    assert torch.equal(first.value(obs), second.value(obs))


@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_update_is_the_eager_one(kind):
    """With one graph per plan: guided or not, and with or without actor and targets."""
    eager, captured = small_agent(kind), small_agent(kind)
    captured._captured = CapturedUpdate(captured._update, FakeGraphs())
    for step in range(24):
        batch, guide = batch_of(kind, step), step >= 12
        if kind == "drqv2":
            for agent in (eager, captured):
                agent.observe_decisions(5000 * step)
        expected = eager.update(batch, guide=guide)
        got = captured.update(batch, guide=guide)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name], got[name]) for name in got)
    assert_same(eager, captured)
    assert captured._captured._graphs.events.count("capture") == (3 if eager.config.actor_every == 2 else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_update_is_the_eager_one(kind, traced_only):
    eager, compiled = small_agent(kind), small_agent(kind, compile=True)
    for step in range(4):
        batch = batch_of(kind, step)
        expected, got = (agent.update(batch, guide=step > 1) for agent in (eager, compiled))
        torch.testing.assert_close(expected, got, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_in_bfloat16(kind):
    exact, rounded = small_agent(kind), small_agent(kind, encoder_dtype="bfloat16")
    batch, half = batch_of(kind), batch_of(kind)
    if half.obs.dtype != torch.uint8:
        half.obs, half.next_obs = half.obs.bfloat16(), half.next_obs.bfloat16()
    expected, got = exact.update(batch, guide=True), rounded.update(half, guide=True)
    for name in ("critic_loss", "actor_loss"):
        assert got[name].dtype == torch.float32
        assert got[name].item() == pytest.approx(expected[name].item(), rel=0.1, abs=0.05), name
    assert all(p.dtype == torch.float32 for m in rounded.modules().values() for p in m.parameters())
