import itertools

import pytest

from covr_fast.config import EvalConfig
from covr_fast.seeds import FIRST_EVALUATION_SEED, FIRST_SEED_AFTER, SEEDS, training_seed


def test_runs_are_ten_thousand_seeds_apart():
    assert [training_seed(0, seed, 0, 16) for seed in range(3)] == [0, 10_000, 20_000]
    assert training_seed(5, 1, 300, 16) == 10_305


@pytest.mark.parametrize(
    "run_seed, step", [(99, 0), (99, 9_990), (100, 0), (0, 1_000_000), (200, 0), (2**40, 7)]
)
def test_training_never_takes_a_seed_of_evaluations(run_seed, step):
    seed = training_seed(0, run_seed, step, 64)
    assert seed >= 0
    assert seed + 64 <= FIRST_EVALUATION_SEED or seed >= FIRST_SEED_AFTER
    assert seed + 64 < SEEDS


def test_neighbouring_runs_share_no_environment_after_the_leap():
    seeds = sorted(training_seed(0, seed, 0, 64) for seed in range(90, 110))
    assert min(b - a for a, b in itertools.pairwise(seeds)) >= 64


def test_the_default_evaluations_lie_where_training_does_not():
    assert FIRST_EVALUATION_SEED <= EvalConfig().seed < FIRST_SEED_AFTER
