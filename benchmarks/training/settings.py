"""What both contestants train on: the same pictures, network, batch and ratio of updates to decisions."""

from dataclasses import dataclass, replace

from race import sized

from covr_fast import TrainConfig

ENVIRONMENTS = ("carracing", "racetrack", "cartpole")
WARMUP = sized(256, 32)
"""Decisions with random actions, before the updates begin."""


@dataclass(frozen=True)
class Settings:
    """One race."""

    environment: str
    """One of ENVIRONMENTS."""
    decisions_per_update: int
    threads: int = 1
    """torch's threads."""


def settings_of(settings: Settings) -> TrainConfig:
    """Ours, without a VLM. Stable-Baselines3's are read from them.

    The `fast` agent of the preset `carracing` and its 16 environments everywhere. Random crops are off and
    returns are of one step, because Stable-Baselines3 has no crops and does not store its n-step returns as
    compactly as one-step ones.
    """
    config = TrainConfig.preset("carracing")
    if settings.environment == "racetrack":
        config.env = replace(config.env, id="racetrack-v0", action_repeat=1, max_episode_steps=300)
    if settings.environment == "cartpole":
        config.env = replace(
            config.env, id="CartpoleSwingup-v1", height=84, width=84, action_repeat=8, max_episode_steps=1000
        )
    config.env.num_envs, config.env.batch_size = sized((16, 8), (4, 2))
    config.replay.augment, config.replay.n_step, config.replay.capacity = "none", 1, sized(20_000, 500)
    config.replay.batch_size = sized(config.replay.batch_size, 16)
    config.steps, config.warmup = 10**9, WARMUP * config.env.action_repeat
    config.decisions_per_update = settings.decisions_per_update
    config.threads, config.device, config.video, config.checkpoint_minutes = settings.threads, "cpu", False, 0
    config.vlm.every = config.covr.psi_0 = 10**9  # no priors, no rounds
    config.eval.episodes, config.eval.vlm = 1, False
    return config
