"""Where batches are drawn from: recent and prioritized sampling."""

import numpy as np
import pytest
import torch

from covr_fast.buffer import Prioritized, Recent, ReplayBuffer


def fill(steps, num_envs=2, capacity=100, seed=0, **options) -> ReplayBuffer:
    """A buffer of scalar observations that count."""
    buffer = ReplayBuffer(capacity, num_envs=num_envs, obs_shape=(1,), action_shape=(), seed=seed, **options)
    for t in range(steps):
        add(buffer, t)
    return buffer


def add(buffer, t, terminated=False, env_ids=None):
    rows = buffer.num_envs if env_ids is None else len(env_ids)
    obs = np.full((rows, 1), t, np.float32)
    end = np.full(rows, terminated)
    return buffer.add(obs, np.zeros(rows), obs[:, 0], obs + 1, end, np.zeros(rows, bool), env_ids=env_ids)


def counts(buffer, draws, batch_size=1000) -> dict[int, int]:
    index = torch.cat([buffer.sample(batch_size).index for _ in range(draws // batch_size)])
    values, number = index.unique(return_counts=True)
    return dict(zip(values.tolist(), number.tolist(), strict=True))


def test_recent_follows_its_law():
    buffer = fill(500, num_envs=1, capacity=400, sampler=Recent(eta=0.998, floor=40))
    drawn = counts(buffer, 200_000)
    ages = np.arange(400)  # 0 is the newest
    u = (np.arange(20_000) + 0.5) / 20_000
    size = np.maximum(400 * 0.998 ** (1000 * u), 40)
    law = np.array([(1 / size[size > age]).sum() for age in ages]) / len(u)  # P(age | size) = 1 / size
    frequency = np.array([drawn.get(499 - age, 0) for age in ages]) / 200_000
    blocks = np.abs(law.reshape(20, 20).sum(1) - frequency.reshape(20, 20).sum(1))
    assert blocks.max() < 0.004
    assert frequency[:40].sum() > 2 * frequency[-40:].sum()


def test_recent_takes_every_stream_in_proportion():
    buffer = fill(0, capacity=200, sampler=Recent(eta=0.995, floor=10))
    for t in range(80):
        add(buffer, t, env_ids=[0])
    for t in range(20):
        add(buffer, t, env_ids=[1])
    drawn = counts(buffer, 50_000)
    assert sum(n for index, n in drawn.items() if index % 2 == 1) / 50_000 == pytest.approx(0.2, abs=0.01)


def test_prioritized_frequencies_and_weights():
    buffer = fill(50, num_envs=1, capacity=50, sampler=Prioritized(alpha=0.5, beta=0.7))
    priority = np.random.default_rng(0).random(50) * 4
    buffer.update_priorities(np.arange(50), priority)
    probability = (priority + 1e-6) ** 0.5
    probability /= probability.sum()
    drawn = counts(buffer, 100_000)
    frequency = np.array([drawn.get(i, 0) for i in range(50)]) / 100_000
    np.testing.assert_allclose(frequency, probability, atol=0.002)
    batch = buffer.sample(64)
    weight = (50 * probability[batch.index.numpy()]) ** -0.7
    np.testing.assert_allclose(batch.weight, weight / weight.max(), rtol=1e-4)
    assert batch.weight.dtype == torch.float32
    buffer.beta = 0.0
    assert (buffer.sample(64).weight == 1).all()


def test_new_transitions_get_the_largest_priority():
    buffer = fill(10, num_envs=1, sampler=Prioritized(alpha=1.0))
    buffer.update_priorities(np.arange(10), np.array([100.0, *[0.0] * 9]))
    (new,) = add(buffer, 10).tolist()
    drawn = counts(buffer, 20_000)
    assert drawn[new] / 20_000 == pytest.approx(0.5, abs=0.01)
    assert drawn[0] / 20_000 == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("n_step", [1, 4])
def test_prioritized_draws_exactly_what_can_be_sampled(n_step):
    rng = np.random.default_rng(0)
    options = {"num_envs": 3, "capacity": 31, "n_step": n_step}
    buffer, uniform = fill(0, sampler="prioritized", **options), fill(0, **options)
    for t in range(150):
        env_ids = rng.permutation(3)[: rng.integers(1, 4)]
        end = rng.random() < 0.1
        newest = add(buffer, t, end, env_ids)
        add(uniform, t, end, env_ids)
        buffer.update_priorities(newest, np.ones(len(newest)))  # must not make them ready before their time
        if t % 10 == 9:
            assert counts(buffer, 2000).keys() == counts(uniform, 2000).keys()
    buffer.cut()
    uniform.cut()
    assert counts(buffer, 2000).keys() == counts(uniform, 2000).keys()


def test_priorities_of_overwritten_transitions_are_skipped():
    buffer = fill(30, num_envs=1, capacity=20, sampler=Prioritized(alpha=1.0))
    buffer.update_priorities(np.arange(30), np.array([1e9] * 10 + [1.0] * 20))
    assert max(counts(buffer, 20_000).values()) < 1200
    buffer.update_priorities([3], [1.0])


def test_errors():
    with pytest.raises(ValueError, match="sampler is 'best'"):
        fill(0, sampler="best")
    with pytest.raises(ValueError, match="alpha is 2"):
        Prioritized(alpha=2)
    with pytest.raises(ValueError, match="eta is 1"):
        Recent(eta=1)
    with pytest.raises(ValueError, match="floor is 0"):
        Recent(floor=0)
    with pytest.raises(ValueError, match='needs sampler="prioritized"'):
        fill(5).update_priorities([0], [1.0])
    buffer = fill(0, sampler="prioritized")
    with pytest.raises(IndexError, match="nothing to sample"):
        buffer.sample(3)
    add(buffer, 0)
    with pytest.raises(ValueError, match="2 values for 1 transitions"):
        buffer.update_priorities([0], [1.0, 2.0])
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite and not negative"):
            buffer.update_priorities([0], [bad])
    with pytest.raises(ValueError, match="too large"):
        fill(5, sampler=Prioritized(alpha=1.0)).update_priorities([0, 2], [1.0, 1e39])
