"""Seeds of environments. Training and evaluations use different ones, so no run is evaluated on episodes of
its training."""

FIRST_EVALUATION_SEED = 1_000_000
"""First seed of evaluations (`eval.seed`). `covr-fast evaluate` starts at twice this."""
FIRST_SEED_AFTER = 10_000_000
"""Training seeds that would reach those of evaluations continue from here."""
SEEDS = 2**31 - 1
"""Number of seeds: EnvPool takes 32-bit integers."""


def training_seed(first: int, run_seed: int, step: int, num_envs: int) -> int:
    """Seed of the first of `num_envs` environments, which take consecutive seeds, in a run that begins or is
    resumed at `step`.

    Runs are 10,000 seeds apart. A resumed run has other episodes than those it began with.
    """
    seed = first + 10_000 * run_seed + step
    if seed + num_envs <= FIRST_EVALUATION_SEED:
        return seed
    return FIRST_SEED_AFTER + (seed - FIRST_EVALUATION_SEED + num_envs) % (
        SEEDS - FIRST_SEED_AFTER - num_envs
    )
