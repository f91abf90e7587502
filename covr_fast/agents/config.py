"""The settings of an agent, and the published ones by kind."""

from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple

import torch

from ..errors import UserError, unknown

Kind = Literal["sac", "rad", "drq", "drqv2", "deepmdp", "fast"]


class BatchForm(NamedTuple):
    """How an agent wants the observations of its batches."""

    dtype: torch.dtype
    """uint8, or a floating dtype for values in [0, 1]."""
    augments: bool
    """Whether the agent augments the observations itself, so that the replay must not."""


@dataclass
class AgentConfig:
    """A visual agent. The defaults are those of `fast`; `agent_config(kind)` gives what was published for the
    other kinds. docs/agents.md lists every number with its source."""

    kind: Kind = "fast"
    """sac: SAC-AE's pixel SAC without its decoder. rad, drq, drqv2, deepmdp: as published. fast: SAC with a
    smaller encoder without target, for CPUs."""
    channels: tuple[int, ...] = (32, 32, 32, 32)
    """Output channels of the convolutions. They are 3x3; the first one of `fast` is 5x5."""
    strides: tuple[int, ...] = (2, 2, 1, 1)
    """Strides of the convolutions."""
    latent: int = 50
    """Width of the latent that a linear layer with LayerNorm makes of the convolutions' features."""
    hidden: int = 1024
    """Width of the two hidden layers of actor and critic."""
    lr: float = 1e-3
    """Learning rate of everything but the temperature (Adam)."""
    alpha_lr: float = 1e-3
    """Learning rate of the temperature (Adam on its logarithm)."""
    alpha_beta: float = 0.9
    """beta1 of the temperature's Adam."""
    init_alpha: float = 0.1
    """Temperature at the start; later it adapts to the target entropy."""
    target_entropy: float | None = None
    """Entropy that the temperature adapts to, in nats. None: minus the number of action dimensions."""
    log_std_min: float = -5.0
    """Least logarithm of the policy's standard deviation, before it is squashed."""
    log_std_max: float = 2.0
    """Greatest logarithm of it."""
    tau: float = 0.01
    """Share of the critic's weights in the moving average that is its target, per update of the targets."""
    encoder_tau: float | None = None
    """The same for the encoder: the convolutions, and the linear layer and LayerNorm on the critic's side.
    None: the encoder has no target (`fast`, `drqv2`)."""
    actor_every: int = 1
    """Updates of the critic per update of actor and temperature."""
    target_every: int = 1
    """Updates of the critic per update of the targets."""
    shifts: int = 1
    """`drq`: random shifts of each observation over which it averages targets and losses (K = M)."""
    shift_pad: int = 4
    """`drq`: most pixels of a shift, in each direction."""
    std_start: float | None = None
    """`drqv2`: standard deviation of the exploration noise at the first decision."""
    std_end: float = 0.1
    """`drqv2`: standard deviation from decision `std_decisions` on; linear in between."""
    std_decisions: int = 100_000
    """`drqv2`: decisions after which the noise is at its least."""
    std_clip: float = 0.3
    """`drqv2`: most noise in the actions of an update, in either direction."""
    model_decay: float = 0.0
    """`deepmdp`: weight decay of the Adam of its reward and transition models."""
    encoder_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the convolutions compute in. bfloat16 is for GPUs and for CPUs that have instructions for it."""
    prior_weight: float = 1.0
    """lambda of Eq. 4 (the paper: 2.0 on CARLA, 1.0 on DMControl)."""
    reward_scale: float = 1.0
    """Factor on rewards inside the Bellman target; reported returns are never scaled."""
    graph: bool = True
    """On a GPU, launch the whole update as one CUDA graph, sampling included (3.2 times as fast as kernel by
    kernel: benchmarks/GPU.md). Then all batches must have one size. A CPU ignores it."""
    compile: bool = False
    """Compile losses and gradients with torch.compile, which delays the first updates. Off because it gains
    nothing on a CPU (docs/carracing.md) and has not run on a GPU. With `graph`, the graph records the
    compiled code."""

    @property
    def batch_form(self) -> BatchForm:
        """What the replay must give to this agent."""
        if self.kind == "drq":
            return BatchForm(torch.uint8, True)
        return BatchForm(getattr(torch, self.encoder_dtype), False)

    def check(self) -> None:
        """Raises a UserError for settings that do not fit together, or have no meaning for the kind."""
        if self.kind not in _MEANINGLESS:
            raise unknown("agent.kind", self.kind, _MEANINGLESS)
        begin = f"begin with the published settings: agent_config({self.kind!r})"
        default = AgentConfig()
        for name in _MEANINGLESS[self.kind]:
            value, neutral = getattr(self, name), getattr(default, name)
            if value != neutral:
                raise UserError(
                    f"agent.{name}={value} has no meaning for agent.kind={self.kind!r}: leave it at {neutral}"
                )
        if self.kind in _WITH_TARGET_ENCODER and self.encoder_tau is None:
            raise UserError(
                f"agent.encoder_tau is missing, and agent.kind={self.kind!r} has a target encoder: {begin}"
            )
        if self.kind == "drqv2" and self.std_start is None:
            raise UserError(f"agent.std_start is missing, the noise of agent.kind='drqv2': {begin}")
        if len(self.channels) != len(self.strides):
            raise UserError(
                f"agent.channels={self.channels} and agent.strides={self.strides} must have the same length"
            )
        for name in ("actor_every", "target_every", "shifts", "std_decisions", "latent", "hidden"):
            if getattr(self, name) < 1:
                raise UserError(f"agent.{name}={getattr(self, name)} must be at least 1")
        for name in ("init_alpha", "std_start", "std_end", "std_clip"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"agent.{name}={value} must be above 0")
        for name in ("tau", "encoder_tau"):
            tau = getattr(self, name)
            if tau is not None and not 0 < tau <= 1:
                raise UserError(f"agent.{name}={tau} must lie in (0, 1]")
        if not self.log_std_min < self.log_std_max:
            raise UserError(
                f"agent.log_std_min={self.log_std_min} must be below agent.log_std_max={self.log_std_max}"
            )


_WITH_TARGET_ENCODER = ("sac", "rad", "drq", "deepmdp")
_DRQ = ("shifts", "shift_pad")
_DRQV2 = ("std_start", "std_end", "std_decisions", "std_clip")
_DEEPMDP = ("model_decay",)
_SOFT = ("alpha_lr", "alpha_beta", "init_alpha", "target_entropy", "log_std_min", "log_std_max")
# What each kind does not read.
_MEANINGLESS: dict[str, tuple[str, ...]] = {
    "sac": (*_DRQ, *_DRQV2, *_DEEPMDP),
    "rad": (*_DRQ, *_DRQV2, *_DEEPMDP),
    "drq": (*_DRQV2, *_DEEPMDP),
    "drqv2": (*_DRQ, *_DEEPMDP, *_SOFT, "encoder_tau"),
    "deepmdp": (*_DRQ, *_DRQV2),
    "fast": (*_DRQ, *_DRQV2, *_DEEPMDP, "encoder_tau"),
}

# MishaLaskin/rad, train.py and scripts/run.sh; denisyarats/pytorch_sac_ae has the same numbers.
_RAD = AgentConfig(
    kind="rad",
    strides=(2, 1, 1, 1),
    alpha_lr=1e-4,
    alpha_beta=0.5,
    log_std_min=-10.0,
    encoder_tau=0.05,
    actor_every=2,
    target_every=2,
)
_PUBLISHED = {
    "rad": _RAD,
    "sac": replace(_RAD, kind="sac"),
    # facebookresearch/deep_bisim4control, run_local_carla096.sh
    "deepmdp": replace(_RAD, kind="deepmdp", model_decay=1e-7),
    # denisyarats/drq, config.yaml
    "drq": replace(_RAD, kind="drq", alpha_lr=1e-3, alpha_beta=0.9, encoder_tau=0.01, shifts=2),
    # facebookresearch/drqv2, cfgs/config.yaml and cfgs/task/easy.yaml
    "drqv2": AgentConfig(kind="drqv2", strides=(2, 1, 1, 1), lr=1e-4, std_start=1.0),
    "fast": AgentConfig(),
}


def agent_config(kind: Kind) -> AgentConfig:
    """The published settings of a kind of agent, or those of `fast`; a new object.

    They are for DMControl. What a source sets by task (RAD's learning rate for cheetah, the noise schedule of
    DrQ-v2) is in docs/agents.md.

    Raises:
        UserError: unknown kind.
    """
    if kind not in _PUBLISHED:
        raise unknown("agent.kind", kind, _PUBLISHED)
    return replace(_PUBLISHED[kind])


def ignored(kind: Kind) -> list[str]:
    """Fields of AgentConfig that have no meaning for a kind."""
    return [field.name for field in fields(AgentConfig) if field.name in _MEANINGLESS[kind]]
