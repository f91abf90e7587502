"""Which samples of a round are held out."""

import numpy as np
import pytest
import torch

from covr_fast.vlm.finetune.split import split


def held_episodes(episodes, share=0.1, seed=0, best=0):
    """The episodes that are held out, whole; the sample `best` has the largest weight."""
    episodes = torch.as_tensor(episodes)
    weights = torch.full((len(episodes),), 0.5)
    weights[best] = 1.0
    held_out, training = split(weights, episodes, share, seed)
    assert torch.equal(torch.cat((held_out, training)).sort().values, torch.arange(len(episodes)))
    assert torch.equal(held_out, held_out.sort().values)
    assert torch.equal(training, training.sort().values)
    held, trained = set(episodes[held_out].tolist()), set(episodes[training].tolist())
    assert not held & trained
    assert int(episodes[best]) in trained
    return held


def test_random_episodes():
    rng = np.random.default_rng(0)
    for seed in range(50):
        episodes = rng.integers(0, rng.integers(2, 40), rng.integers(2, 200)) * 1_000_003
        if len(set(episodes)) > 1:
            assert held_episodes(episodes, rng.uniform(0.01, 0.99), seed, rng.integers(len(episodes)))


def test_the_share_is_met_as_closely_as_whole_episodes_allow():
    for size in (1, 3, 7):
        episodes = torch.arange(60).repeat_interleave(size)
        for share in (0.1, 0.25, 0.5):
            assert len(held_episodes(episodes, share)) == round(60 * share)
    # 7 samples are nearer to 9.8 than 14 are, and 14 nearer to 11.76.
    episodes = torch.arange(14).repeat_interleave(7)
    assert len(held_episodes(episodes, 0.1)) == 1
    assert len(held_episodes(episodes, 0.12)) == 2


def test_one_episode_is_held_out_if_there_are_two_however_long_it_is():
    assert held_episodes([4, 9, 9, 9, 9], 0.1) == {9}
    assert held_episodes([4, 9, 9, 9, 9], 0.1, best=1) == {4}


def test_nothing_is_held_out_of_one_episode_or_with_share_0():
    assert held_episodes([4, 4, 4], 0.5) == set()
    assert held_episodes([4], 0.5) == set()
    assert held_episodes(range(10), 0.0) == set()


def test_the_order_of_episodes_is_that_of_the_seed_in_every_round():
    """Whatever other samples of them there are, the same episodes come first."""
    first = held_episodes([0, *np.repeat(np.arange(1, 21), 5)], 0.25)
    later = held_episodes([0, *np.repeat(np.arange(1, 21), 2)], 0.25)
    assert first == later
    more = held_episodes([0, *np.repeat(np.arange(1, 21), 3)], 0.5)
    assert first < more
    assert len({frozenset(held_episodes(range(20), 0.25, seed)) for seed in range(8)}) > 4


@pytest.mark.parametrize(("seed", "expected"), [(0, {14, 15}), (1, {5, 9})])
def test_the_split_is_the_same_on_every_machine(seed, expected):
    """So that a run that is resumed elsewhere goes on with it."""
    assert held_episodes(range(20), 0.1, seed) == expected
