"""Which environment seeds a run takes: it is never evaluated on episodes that it trained on."""

FIRST_EVALUATION_SEED = 1_000_000
"""Evaluations count on from here (`eval.seed`), `covr-fast evaluate` from twice that."""
FIRST_SEED_AFTER = 10_000_000
"""Where training goes on that would otherwise have come among the seeds of evaluations."""
SEEDS = 2**31 - 1
"""EnvPool takes 32-bit integers."""


def training_seed(first: int, run_seed: int, step: int, num_envs: int) -> int:
    """Seed of the first of `num_envs` environments, which take consecutive ones, of a run begun or resumed at
    `step`.

    Runs are 10,000 apart, and a resumed run goes on with other episodes than it began with.
    """
    seed = first + 10_000 * run_seed + step
    if seed + num_envs <= FIRST_EVALUATION_SEED:
        return seed
    return FIRST_SEED_AFTER + (seed - FIRST_EVALUATION_SEED + num_envs) % (
        SEEDS - FIRST_SEED_AFTER - num_envs
    )
