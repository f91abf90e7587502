"""Every published agent computes what its source's equations say, and a broken one does not."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from published import PUBLISHED, Weights

from covr_fast.agents import agent_config, make_agent
from covr_fast.agents.encoder import Convolutions, Projection

SHAPE = (3, 24, 24)
UPDATES = 3


def small(kind, **changes):
    """The published settings of a kind with narrow layers and a weight decay that shows."""
    sizes = {"channels": (4, 4, 4, 4), "latent": 5, "hidden": 16, "prior_weight": 2.0}
    decay = {"model_decay": 0.01} if kind == "deepmdp" else {}
    return replace(agent_config(kind), **sizes, **decay, **changes)


def exact_agent(kind, **changes):
    """It computes in float64, so that only errors show."""
    agent = make_agent(SHAPE, (2,), small(kind, **changes), seed=5)
    for net in agent.modules().values():
        net.double()
        for part in net.modules():
            if isinstance(part, Convolutions):
                part.dtype = torch.float64
    if kind == "drqv2":
        agent.observe_decisions(30_000)
        agent.std = torch.tensor(0.73)
    else:
        agent.log_alpha.data = agent.log_alpha.data.double()
    draw = agent._noise
    agent._noise = lambda rows: draw(rows).double()
    return agent


def batches(kind):
    g = torch.Generator().manual_seed(0)
    for step in range(UPDATES):
        made = {"action": torch.rand(4, 2, generator=g) * 2 - 1, "reward": torch.randn(4, generator=g)}
        for name in ("obs", "next_obs"):
            if kind == "drq":  # of 0 and 255, whose quotient by 255 is exact in any dtype
                made[name] = torch.randint(2, (4, *SHAPE), generator=g, dtype=torch.uint8) * 255
            else:
                made[name] = torch.rand(4, *SHAPE, generator=g, dtype=torch.float64)
        prior = torch.rand(4, 2, generator=g, dtype=torch.float64) * 2 - 1
        doubles = {name: made[name].double() for name in ("action", "reward")}
        yield (
            SimpleNamespace(
                **(made | doubles),
                discount=torch.tensor([0.9, 0.0, 0.99, 0.99], dtype=torch.float64),
                weight=torch.ones(4, dtype=torch.float64),
                extras={"prior": prior, "prior_mask": torch.tensor([1.0, 0, 1, 0], dtype=torch.float64)},
            ),
            step == 2,  # guided
        )


def distance(kind, fault=None):
    """The largest difference between the weights of an agent and the equations', after the updates. `fault`
    breaks the agent."""
    agent = exact_agent(kind)
    expected = Weights(agent)
    if fault is not None:
        fault(agent)
    PUBLISHED[kind](expected, small(kind), batches(kind), torch.Generator().manual_seed(5))
    for batch, guide in batches(kind):
        agent.update(batch, guide=guide)
    got = Weights(agent)
    if expected.log_alpha is not None:
        expected["log_alpha"], got["log_alpha"] = expected.log_alpha, got.log_alpha
    assert fault is not None or got.keys() == expected.keys()
    return max((expected[name] - got[name]).abs().max().item() for name in got)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_three_updates_are_those_of_the_equations(kind):
    assert distance(kind) < 1e-9


# ---- broken agents -----------------------------------------------------------------------------------


def no_target_encoder(agent):
    agent.encoder_target = None


def lighter_prior(agent):
    agent.weigh_prior(1.0)


def set_config(**changes):
    def change(agent):
        agent.config = replace(agent.config, **changes)

    return change


def actor_before_critic(agent):
    agent.config.kind = "fast"  # its actor reads features from before the critic's step


def encoder_in_the_actors_step(agent):
    agent._encode = lambda networks, pixels: networks.encoder(pixels)
    agent.actor_optimizer.add_param_group({"params": list(agent.encoder.parameters())})


def other_squash(agent):
    for net in agent.modules().values():
        for part in net.modules():
            if isinstance(part, Projection):
                part.squash = not part.squash


def actor_uses_the_critics_trunk(agent):
    agent.actor.trunk = agent.critic.trunk


def one_shift_of_two_is_judged(agent):
    judge = agent._critic_loss

    def half(networks, batch, noise, **options):
        batch.obs = batch.obs[: len(batch.reward)]
        return judge(networks, batch, noise, **options)

    agent._critic_loss = half


def model_without_encoder(agent):
    agent.encoder_optimizer.param_groups.clear()


def model_after_actor(agent):
    update, models = agent._update, agent.models

    def late(batch, plan):
        agent.models = None
        metrics = update(batch, plan)
        agent.models = models
        return metrics | agent.update_models(models, batch)

    agent._update = late


def pixels_not_centred(agent):
    agent.encoder.offset = 0.0


def target_of_q_only(agent):
    agent.critic_target.trunk = agent.critic.trunk


SHARED = [
    set_config(encoder_tau=0.02), set_config(tau=0.05), set_config(actor_every=1), set_config(target_every=1),
    lighter_prior, no_target_encoder, actor_before_critic, encoder_in_the_actors_step,
    other_squash, actor_uses_the_critics_trunk,
]  # fmt: skip
BROKEN = [
    *(("rad", fault) for fault in SHARED),
    *(("sac", fault) for fault in (no_target_encoder, other_squash, actor_before_critic)),
    *(("drq", fault) for fault in (one_shift_of_two_is_judged, set_config(shift_pad=2), actor_before_critic)),
    *(("deepmdp", fault) for fault in (model_without_encoder, model_after_actor, other_squash)),
    *(("drqv2", fault) for fault in (pixels_not_centred, set_config(std_clip=9.0), target_of_q_only)),
    *(("drqv2", set_config(**change)) for change in ({"tau": 0.05}, {"actor_every": 2})),
]


@pytest.mark.parametrize(("kind", "fault"), BROKEN)
def test_a_broken_piece_shows(kind, fault):
    assert distance(kind, fault) > 1e-6
