"""What the published agents ask of a run: batches, frames, augmentation and pace (docs/agents.md has the
sources)."""

from dataclasses import dataclass
from typing import Literal

from .agents import Kind, agent_config
from .config import TrainConfig


@dataclass(frozen=True)
class Pace:
    """How a kind of agent is trained."""

    batch_size: int
    augment: Literal["none", "shift", "crop", "translate"] = "none"
    pad: int = 4
    frame: int = 84
    """Height and width of frames in pixels, before a crop."""
    warmup: int = 1000
    """Decisions at random before updates begin."""
    decisions_per_update: int = 1
    n_step: int = 1
    capacity: int = 1_000_000
    """Most transitions stored."""


PUBLISHED: dict[Kind, Pace] = {
    "sac": Pace(128),
    "rad": Pace(128, "crop", pad=8, frame=100, capacity=100_000),
    "drq": Pace(512, capacity=100_000),  # it makes its shifts itself
    "drqv2": Pace(256, "shift", warmup=2000, decisions_per_update=2, n_step=3),
    "deepmdp": Pace(128),
}
"""All but `fast`, which is trained as a preset says."""


_HARDER = ("Reacher", "Cheetah", "Hopper", "WalkerRun")
"""Tasks of the presets for which DrQ-v2's code has the schedule of its medium ones (cfgs/task/*.yaml)."""


def learn_as_published(config: TrainConfig, kind: Kind) -> None:
    """Gives the run this kind of agent, and what belongs to it, square frames among it: the highway's long
    picture is squeezed. `fast` leaves it as it is.

    Some tasks have settings of their own in the agents' code: RAD's cheetah learns at 2e-4; DrQ-v2's walker
    tasks take one-step returns and batches of 512, and its noise falls more slowly in harder tasks.
    """
    if kind == "fast":
        return
    pace, replay, env = PUBLISHED[kind], config.replay, config.env
    config.agent = agent_config(kind)
    config.warmup = pace.warmup * env.action_repeat
    config.decisions_per_update = pace.decisions_per_update
    env.height = env.width = pace.frame
    env.grayscale = False
    replay.batch_size, replay.n_step, replay.gamma = pace.batch_size, pace.n_step, 0.99
    replay.augment, replay.pad = pace.augment, pace.pad
    # Memory for a million would be taken at once on a GPU, so no more than the task's steps fill, and some.
    replay.capacity = min(pace.capacity, max(100_000, config.decisions(config.steps)))
    if kind == "rad" and env.id.startswith("Cheetah"):
        config.agent.lr = 2e-4
    if kind == "drqv2" and env.id.startswith("Walker"):
        replay.batch_size, replay.n_step = 512, 1
    if kind == "drqv2" and env.id.startswith(_HARDER):
        config.agent.std_decisions = 500_000
