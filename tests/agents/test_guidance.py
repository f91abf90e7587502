"""The guidance term of Eq. 4: what it averages over, what it measures from, and what is logged of it."""

from dataclasses import replace

import pytest
import torch
from small_agents import KINDS, SHAPE, SMALL, assert_same, batch_of, eager_agent, make_batch, small_agent

from covr_fast.agents import SAC, Guidance
from covr_fast.agents.guidance import guidance_figures, prior_loss
from covr_fast.agents.losses import policy_loss
from covr_fast.agents.networks import ActorSample

ACTION = torch.tensor([[0.5, -0.5], [0.1, 0.2], [0.9, 0.0], [0.3, 0.3]])
PRIOR = torch.tensor([[0.0, 0.5], [1.0, 1.0], [-1.0, 0.0], [0.3, 0.3]])
SQUARED = torch.tensor([1.25, 1.45, 3.61, 0.0])


def sample_of(action: torch.Tensor, mean: torch.Tensor | None = None) -> ActorSample:
    return ActorSample(action, torch.zeros(len(action)), action if mean is None else mean)


def gradient_per_row(guided: int, rows: int, guidance: Guidance) -> torch.Tensor:
    """That of the term for the actions [guided, 2] of the rows that carry a prior: the same ones, among as
    many others as it takes to fill the batch."""
    g = torch.Generator().manual_seed(0)
    known, prior = torch.rand(2, guided, 2, generator=g) * 2 - 1
    action = torch.cat((known, torch.rand(rows - guided, 2, generator=g))).requires_grad_()
    priors = torch.cat((prior, torch.full((rows - guided, 2), 9.0)))
    mask = (torch.arange(rows) < guided).float()
    prior_loss(sample_of(action), priors, mask, guidance).backward()
    assert not action.grad[guided:].any()
    return action.grad[:guided]


def test_lambda_weighs_the_same_whether_every_row_or_every_tenth_carries_a_prior():
    """As with vlm.every=1 and vlm.every=10."""
    every = gradient_per_row(8, 8, Guidance())
    tenth = gradient_per_row(8, 80, Guidance())
    assert every.abs().min() > 0
    torch.testing.assert_close(tenth, every)
    torch.testing.assert_close(gradient_per_row(8, 80, Guidance(normalise="batch")), every / 10)


def test_the_agents_step_does_not_depend_on_rows_without_a_prior():
    """The actor's gradient of lambda times the term, through the whole loss: the same guided rows, alone and
    with nine others each."""
    agent, gradients = eager_agent(1), []
    for others in (0, 9):
        n = 4 * (1 + others)
        batch = make_batch(n=4, seed=1)
        wide = make_batch(n=n, seed=2)
        noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            latent = torch.cat((agent.encoder(batch.obs), agent.encoder(wide.obs[4:])))
        prior = torch.cat((batch.extras["prior"], wide.extras["prior"][4:]))
        noise[:4] = torch.randn(4, 2, generator=torch.Generator().manual_seed(8))
        extras = {"prior": prior, "prior_mask": (torch.arange(n) < 4).float()}
        of_guide = []
        for guide in (False, True):
            agent.actor.zero_grad()
            loss, _ = policy_loss(
                agent.networks, latent, extras, noise, guide=guide, prior_weight=2.0, target_entropy=-2.0,
                guidance=Guidance(),
            )  # fmt: skip
            loss.backward()
            of_guide.append(torch.cat([p.grad.flatten() for p in agent.actor.parameters()]))
        gradients.append(of_guide[1] - of_guide[0])
    assert gradients[0].norm() > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("normalise, expected", [("guided", 4.86 / 2), ("batch", 4.86 / 4)])
def test_the_term_by_hand(normalise, expected):
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
    loss = prior_loss(sample_of(ACTION), PRIOR, mask, Guidance(normalise=normalise))
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("normalise", ["guided", "batch"])
def test_a_batch_without_a_prior_adds_nothing(normalise):
    action = ACTION.clone().requires_grad_()
    loss = prior_loss(sample_of(action), PRIOR, torch.zeros(4), Guidance(normalise=normalise))
    loss.backward()
    assert loss.item() == 0
    assert not action.grad.any()


def test_an_unsure_prior_weighs_less_and_counts_as_one():
    """The mask is then the VLM's confidence (covr.confidence)."""
    sure = prior_loss(sample_of(ACTION), PRIOR, torch.tensor([1.0, 0, 1.0, 0]), Guidance())
    unsure = prior_loss(sample_of(ACTION), PRIOR, torch.tensor([0.5, 0, 0.5, 0]), Guidance())
    assert unsure.item() == pytest.approx(sure.item() / 2)


def test_the_distance_to_the_mean_leaves_the_actors_spread_alone():
    """The term's gradient for the outputs that are the log-std is zero only then."""
    agent = eager_agent(1)
    noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    prior, last = torch.full((5, 2), 0.7), agent.actor.net[-1]
    spread = {}
    for distance in ("sample", "mean"):
        agent.actor.zero_grad()
        sample = agent.actor(torch.rand(5, SMALL.latent, generator=torch.Generator().manual_seed(1)), noise)
        loss = prior_loss(sample, prior, torch.ones(5), Guidance(distance=distance))
        loss.backward()
        assert last.weight.grad[:2].any()
        spread[distance] = last.weight.grad[2:].abs().sum().item()
        measured = sample.mean if distance == "mean" else sample.action
        assert loss.item() == pytest.approx((measured - prior).square().sum(1).mean().item())
    assert spread["mean"] == 0
    assert spread["sample"] > 0


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(normalise="batch"), Guidance(distance="mean")])
def test_what_is_logged_of_the_term(guidance):
    mask, q = torch.tensor([0.5, 0.0, 0.5, 0.0]), torch.tensor([-3.0, 1.0, 2.0, -2.0])
    sample = sample_of(ACTION) if guidance.distance == "sample" else sample_of(torch.zeros(4, 2), ACTION)
    figures = guidance_figures(sample, PRIOR, mask, q, guidance, 2.0)
    term = 0.5 * (SQUARED[0] + SQUARED[2]) / (4 if guidance.normalise == "batch" else 2)
    assert {name: value.item() for name, value in figures.items()} == {
        "prior_loss": pytest.approx(term.item()),
        "prior_distance": pytest.approx(4.86 / 2),
        "guided_share": 0.5,
        "prior_to_q": pytest.approx(2 * term.item() / 2),
    }


def test_figures_are_there_when_priors_guide():
    names = {"prior_loss", "prior_distance", "guided_share", "prior_to_q"}
    metrics = eager_agent().update(make_batch(), guide=True)
    assert names <= metrics.keys()
    assert metrics["guided_share"] == 1
    assert not names & eager_agent().update(make_batch(), guide=False).keys()


def test_an_agent_learns_otherwise_with_another_form():
    """In a batch of which half the rows carry a prior."""
    weights = []
    for guidance in (Guidance(), Guidance(normalise="batch"), Guidance(distance="mean")):
        agent = SAC(SHAPE, (2,), replace(SMALL, prior_weight=5.0), seed=0, guidance=guidance)
        batch = make_batch()
        batch.extras["prior_mask"] = torch.tensor([1.0, 0, 1, 0, 1, 0])
        for _ in range(2):  # Adam's first step only knows signs
            agent.update(batch, guide=True)
        weights.append(torch.cat([p.detach().flatten() for p in agent.actor.parameters()]))
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_of_the_prior_may_change_between_updates(kind):
    def updated(guide: bool, *weights: float, begin: float = 1.0):
        agent = small_agent(kind, prior_weight=begin)
        for weight in weights:
            agent.weigh_prior(weight)
        agent.update(batch_of(kind), guide=guide)
        return agent

    assert_same(updated(True, 0.0), updated(False))
    assert_same(updated(True, 3.0, 7.0), updated(True, begin=7.0))
    heavy, light = updated(True, 7.0), updated(True, 0.5)
    with pytest.raises(AssertionError):
        assert_same(heavy, light)


@pytest.mark.parametrize("kind", KINDS)
def test_the_critic_values_given_actions(kind):
    agent, batch = small_agent(kind), make_batch(0)
    obs = (batch.obs * 255).to(torch.uint8)
    mean = agent.act(obs, explore=False)
    torch.testing.assert_close(agent.value(obs, mean), agent.value(obs))
    other = agent.value(obs, batch.action)
    assert other.shape == (len(obs),)
    assert not torch.allclose(other, agent.value(obs))
