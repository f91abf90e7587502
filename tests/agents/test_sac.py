from dataclasses import replace

import numpy as np
import pytest
import torch
from simulators import SIZE, target_envs
from small_agents import SHAPE, SMALL, assert_same, eager_agent, make_batch

from covr_fast import ReplayBuffer
from covr_fast.agents import SAC, AgentConfig, Guidance
from covr_fast.agents.guidance import prior_loss
from covr_fast.agents.losses import bellman_target, policy_loss
from covr_fast.agents.networks import Actor, ActorSample, mlp
from covr_fast.errors import UserError


def test_log_prob_is_that_of_the_squashed_gaussian():
    torch.manual_seed(0)
    actor = Actor(torch.nn.Identity(), mlp(4, 8, 6, 1.0), (-5.0, 2.0)).double()
    latent, noise = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    sample = actor(latent, noise)
    mean, raw = actor.net(latent).chunk(2, -1)
    log_std = -5 + 3.5 * (torch.tanh(raw) + 1)
    normal = torch.distributions.Normal(mean, log_std.exp())
    truth = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
    torch.testing.assert_close(sample.log_prob, truth.log_prob(sample.action).sum(-1))


def test_bellman_target_tells_terminated_from_truncated():
    agent = eager_agent(0)
    batch = make_batch(discount=torch.tensor([0.9, 0.0, 0.9, 0.0, 0.9, 0.9]))
    noise = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    target = bellman_target(agent.networks, batch, noise, reward_scale=0.5)
    torch.testing.assert_close(target[[1, 3]], 0.5 * batch.reward[[1, 3]])  # terminated: nothing follows
    with torch.no_grad():
        latent = agent.encoder(batch.next_obs)
        sample = agent.actor(latent, noise)
        q = torch.minimum(*agent.critic_target(latent, sample.action))
        value = q - 0.1 * sample.log_prob
    rows = [0, 2, 4, 5]
    torch.testing.assert_close(target[rows], (0.5 * batch.reward + 0.9 * value)[rows])


def sample_of(action):
    return ActorSample(action, torch.zeros(len(action)), action)


def test_prior_loss_gradient_by_hand():
    """d/da of lambda / n * sum_b m_b ||a_v - a_r||^2 is 2 lambda m_b (a_r - a_v) / n, with n rows that carry
    a prior."""
    action = torch.tensor([[0.5, -0.5], [0.1, 0.2], [0.9, 0.0]], requires_grad=True)
    prior = torch.tensor([[0.0, 0.5], [1.0, 1.0], [-1.0, 0.0]])
    mask = torch.tensor([1.0, 0.0, 1.0])
    loss = 2.0 * prior_loss(sample_of(action), prior, mask, Guidance())
    loss.backward()
    assert loss.item() == pytest.approx(2.0 * (1.25 + 3.61) / 2)
    expected = 2 * 2.0 * mask[:, None] * (action.detach() - prior) / 2
    torch.testing.assert_close(action.grad, expected)


def test_guidance_adds_exactly_eq_4_to_the_actor_gradient():
    agent = eager_agent(1)
    batch = make_batch(n=8)
    noise = torch.randn(8, 2, generator=torch.Generator().manual_seed(7))
    batch.extras["prior_mask"] = torch.tensor([1.0, 0, 1, 0, 0, 1, 1, 0])
    with torch.no_grad():
        latent = agent.encoder(batch.obs)

    def gradient(guide):
        agent.actor.zero_grad()
        loss, _ = policy_loss(
            agent.networks, latent, batch.extras, noise, guide=guide, prior_weight=2.0, target_entropy=-2.0,
            guidance=Guidance(),
        )  # fmt: skip
        loss.backward()
        return torch.cat([p.grad.flatten() for p in agent.actor.parameters()])

    difference = gradient(True) - gradient(False)
    agent.actor.zero_grad()
    action = agent.actor(latent, noise).action
    action.backward(4.0 * batch.extras["prior_mask"][:, None] * (action.detach() - batch.extras["prior"]) / 4)
    by_hand = torch.cat([p.grad.flatten() for p in agent.actor.parameters()])
    assert by_hand.norm() > 0
    torch.testing.assert_close(difference, by_hand, rtol=1e-4, atol=1e-6)


def test_priors_are_not_read_before_the_cold_start_is_over():
    batch = make_batch()
    batch.extras = {"prior": torch.full((6, 2), torch.nan), "prior_mask": torch.ones(6)}
    metrics = eager_agent().update(batch, guide=False)
    assert "prior_loss" not in metrics
    assert all(torch.isfinite(value).all() for value in metrics.values())


def test_a_checkpoint_of_another_kind_of_device_loads():
    agent = eager_agent()
    state = agent.state_dict()
    state["generator"] = state["generator"][:16]  # the size of a CUDA generator's
    other = eager_agent(1)
    other.load_state_dict(state)
    obs = torch.randint(0, 256, (4, *SHAPE), dtype=torch.uint8)
    assert torch.equal(other.act(obs, explore=False), agent.act(obs, explore=False))


def test_value_is_that_of_the_mean_action():
    agent = SAC(SHAPE, (2,), replace(SMALL, reward_scale=0.5))
    obs = torch.randint(0, 256, (4, *SHAPE), dtype=torch.uint8)
    action = agent.act(obs, explore=False)
    random_state = agent.generator.get_state()
    expected = agent.critic(agent.encoder(obs.float() / 255), action).amin(0) * 2
    torch.testing.assert_close(agent.value(obs), expected)
    assert torch.equal(agent.generator.get_state(), random_state)  # it takes no randomness


def test_target_follows_the_critic():
    agent = SAC(SHAPE, (2,), replace(SMALL, tau=0.25))
    old = [p.clone() for p in agent.critic_target.parameters()]
    agent.update(make_batch(), guide=False)
    new = zip(old, agent.critic_target.parameters(), agent.critic.parameters(), strict=True)
    for before, target, online in new:
        torch.testing.assert_close(target, before + 0.25 * (online - before))


@pytest.mark.parametrize("reload", [False, True])
def test_a_state_dict_continues_bit_for_bit_and_shares_nothing(reload):
    first, second = eager_agent(3), eager_agent(4)
    first.update(make_batch(1), guide=True)
    state = first.state_dict()
    for agent in (first, second) if reload else (second,):
        agent.load_state_dict(state)
    for agent in (first, second):
        agent.update(make_batch(2), guide=True)
    assert_same(first, second)


def test_fast_gives_the_digits_that_it_always_gave():
    """Recorded on 2026-11-27, before there were other kinds. Another order of sums changes the last ones."""
    agent = eager_agent(3)
    for step in range(4):
        metrics = agent.update(make_batch(step), guide=step > 1)
    recorded = {
        "critic_loss": 0.521746, "q": 0.358611, "entropy": -0.293943, "prior_loss": 0.569922,
        "actor_loss": 0.499710, "alpha": 0.099702,
    }  # fmt: skip
    assert {name: metrics[name].item() for name in recorded} == pytest.approx(recorded, abs=1e-4)
    sums = {
        name: sum(p.detach().abs().sum().item() for p in net.parameters())
        for name, net in agent.modules().items()
    }
    recorded = {"encoder": 196.1007, "actor": 309.4319, "critic": 659.9876, "critic_target": 659.8791}
    assert sums == pytest.approx(recorded, abs=1e-2)
    obs = torch.arange(2 * 3 * SIZE * SIZE).reshape(2, *SHAPE).to(torch.uint8)
    assert agent.act(obs).flatten().tolist() == pytest.approx(
        [-0.026421, -0.284890, 0.006904, 0.153393], abs=1e-4
    )
    assert agent.value(obs).tolist() == pytest.approx([0.544626, 0.660865], abs=1e-3)


def test_frames_too_small_for_the_network():
    with pytest.raises(UserError, match=r"too small for agent\.strides"):
        SAC((3, 8, 8), (2,), AgentConfig(channels=(8, 8, 8), strides=(2, 2, 2)))


def test_convolutions_in_bfloat16_give_nearly_the_same_update():
    """Only they: latents, losses and all weights are float32, and frames may come in either dtype."""
    exact, rounded = (
        SAC(SHAPE, (2,), replace(SMALL, encoder_dtype=dtype), seed=0) for dtype in ("float32", "bfloat16")
    )
    batch, half = make_batch(), make_batch()
    half.obs, half.next_obs = half.obs.bfloat16(), half.next_obs.bfloat16()
    latent, latent_half = exact.encoder(batch.obs), rounded.encoder(half.obs)
    assert latent_half.dtype == torch.float32
    assert 0 < (latent - latent_half).abs().max() < 0.05
    one, other = exact.update(batch, guide=True), rounded.update(half, guide=True)
    for name in ("critic_loss", "actor_loss", "entropy"):
        assert other[name].item() == pytest.approx(one[name].item(), rel=0.05, abs=0.02), name
    assert all(weight.dtype == torch.float32 for weight in rounded.encoder.parameters())
    gradient, rounded_gradient = (a.encoder[0].layers[0].weight.grad for a in (exact, rounded))
    assert torch.cosine_similarity(gradient.flatten(), rounded_gradient.flatten(), dim=0) > 0.98


def test_learns_a_task_that_needs_its_eyes():
    """Pointing at a bright column: whoever is blind gets 0.5 a step at best, on average.

    Three latents, because in more of them the column shows even through an encoder that has learned nothing
    (with 32 a frozen one gets as much as a trained one; with three 0.7).
    """
    torch.manual_seed(0)
    envs = target_envs(16)
    config = AgentConfig(channels=(8, 16), strides=(2, 1), latent=3, hidden=64, lr=1e-3)
    agent = SAC(envs.obs_shape, envs.action_shape, config, seed=0)
    shapes = {"obs_shape": envs.obs_shape, "action_shape": envs.action_shape}
    buffer = ReplayBuffer(4000, num_envs=16, gamma=0.0, seed=0, **shapes)
    recent: list[float] = []
    with envs:
        obs = envs.reset()
        (ids,) = envs.batches()
        for step in range(260):
            action = agent.act(torch.from_numpy(obs), explore=step < 220).numpy()
            envs.send(action, ids)
            rows = envs.recv()
            buffer.add(obs, action, rows.reward, rows.next_obs, rows.terminated, rows.truncated)
            obs = rows.obs
            if step >= 20:
                for _ in range(2):
                    agent.update(buffer.sample(64), guide=False)
            if step >= 220:
                recent.append(float(np.mean(rows.reward)))
    assert np.mean(recent) > 0.8
