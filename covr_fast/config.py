"""Every setting of a run, and the presets."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from .agents.sac import SACConfig
from .envs import EnvConfig
from .errors import UserError, unknown
from .schedule import Rule
from .vlm import TunerConfig


@dataclass
class ReplayConfig:
    """The replay buffer D."""

    capacity: int = 100_000
    """Transitions kept in all; a transition costs about one frame of memory."""
    batch_size: int = 256
    """Transitions per update."""
    n_step: int = 1
    """Rewards summed before the bootstrap."""
    gamma: float = 0.99
    """Discount per decision, in the Bellman target and in the returns that EDDF filters."""
    sampler: Literal["uniform", "prioritized", "recent"] = "uniform"
    """How transitions are drawn."""
    augment: Literal["none", "shift", "crop"] = "crop"
    """Random crop (RAD), random shift (DrQ), or neither."""
    pad: int = 4
    """Pixels that a crop takes off, or a shift adds, on each side."""
    device: str = "auto"
    """Where frames are kept: auto (with the agent), cpu or cuda."""


@dataclass
class VLMConfig:
    """The vision-language model and how it is asked."""

    model: str = "nano"
    """A checkpoint directory or hub id of a Qwen2.5-VL; "nano": the same architecture, tiny and untrained."""
    prompt: str | None = None
    """Task prompt. None: the backbone's default."""
    decimals: int = 2
    """Digits after the point in the action text."""
    attention: str = "auto"
    """flash_attention_4, 3 or 2, sdpa, eager; auto takes the first that works."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights' type. auto: as a saved model was saved, else bfloat16 on a GPU, float32 on a CPU."""
    quantization: Literal["auto", "none", "8bit", "4bit"] = "auto"
    """Hold the linear layers in 8 or 4 bits, by bitsandbytes, for tuner.mode="lora". auto: as a saved adapter
    had its base, else as the checkpoint comes."""
    every: int = 10
    """Decisions of an environment between two priors (the paper: every 10 frames)."""
    between: Literal["mask", "hold"] = "mask"
    """Transitions between two priors: masked out of Eq. 4, or given the last prior."""
    temperature: float = 0.0
    """Sampling temperature of the answer; 0 takes the likeliest."""
    background: bool = False
    """Ask off the critical path: a thread labels stored transitions with their priors while the simulation
    goes on, so that runs depend on timing. False: as the paper does, in the step."""
    refresh_priors: bool = False
    """With `background`, label stored transitions again when the VLM has been tuned. The paper does not."""
    graph: bool = False
    """On a GPU, replay the decode of answers as CUDA graphs. Off until that has run on one
    (benchmarks/GPU.md); a CPU takes no notice of it."""
    motion: bool = False
    """Of grey stacks, show the newest three frames as red, green and blue, so that motion can be seen in one
    image. False: the newest frame."""


@dataclass
class COVRConfig:
    """What makes it COVR: the filter, the schedule and the guidance."""

    psi_0: int = 5000
    """Environment steps (decisions) before the first fine-tuning round."""
    schedule: Rule = "linear"
    """How the steps between rounds grow; see FineTuneSchedule."""
    threshold: Literal["described", "equation"] = "described"
    """Sign of the entropy in Eq. 5: Sigmoid(-H) as the text describes, or Sigmoid(+H) as printed."""
    cold_start: int = 2
    """Rounds before the prior guides the actor (the paper: 2 on CARLA, 4 on DMControl)."""
    min_samples: int = 256
    """Samples of finished episodes that a round needs; it waits until D_f holds them."""
    horizon: int | None = None
    """Steps that a return g_t looks ahead. None: to the end of the episode, as in the paper."""
    bootstrap: bool = False
    """Add the critic's value of the last state to the returns of truncated episodes. False: a truncated tail
    counts as the end, as in the paper."""
    publish_after: int | None = None
    """With tuner.overlap, publish a round exactly this many steps after its start, waiting for it if need be,
    so that reruns are bit-identical. None: as soon as it is done."""


@dataclass
class EvalConfig:
    """Evaluation, by the actor alone."""

    episodes: int = 10
    """Episodes per evaluation."""
    every: int = 0
    """Environment steps between evaluations during training; 0: only at the end."""
    vlm: bool = True
    """Also let the VLM drive alone before and after training, asked at every decision."""
    seed: int = 1_000_000
    """First environment seed of evaluations, far from those of training."""


@dataclass
class TrainConfig:
    """A run of COVR."""

    steps: int = 100_000
    """Environment steps (decisions, summed over environments). One decision is env.action_repeat frames."""
    warmup: int = 2000
    """Steps of random actions before the actor takes over and updates begin."""
    steps_per_update: int = 2
    """Environment steps per policy update."""
    seed: int = 0
    """Seed of everything: same seed, same run, bit for bit (synchronous fine-tuning)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the agent and the VLM compute."""
    threads: int = 0
    """Threads of the policy update on a CPU. 0: all cores but those of the simulator."""
    log_every: int = 1000
    """Environment steps between lines of metrics."""
    video: bool = True
    """Record an evaluation episode at the end."""
    checkpoint_every: int = 0
    """Environment steps between checkpoints; 0: only when the run ends or is interrupted."""
    save_replay: bool = False
    """Keep the replay buffer in the final checkpoint too, so that the run can be continued (--steps)."""
    env: EnvConfig = field(default_factory=EnvConfig)
    agent: SACConfig = field(default_factory=SACConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    vlm: VLMConfig = field(default_factory=VLMConfig)
    tuner: TunerConfig = field(default_factory=TunerConfig)
    covr: COVRConfig = field(default_factory=COVRConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @staticmethod
    def preset(name: str) -> TrainConfig:
        """A preset by name.

        Raises:
            UserError: no such preset; the message suggests near names.
        """
        if name not in PRESETS:
            raise unknown("preset", name, PRESETS)
        return PRESETS[name].build()

    def check(self) -> None:
        """Raises a UserError for settings that do not fit together."""
        least = {
            "steps": 1, "seed": 0, "warmup": 1, "steps_per_update": 1, "log_every": 1, "checkpoint_every": 0,
            "threads": 0,
            "replay.batch_size": 1, "replay.n_step": 1, "replay.pad": 0, "vlm.every": 1, "vlm.decimals": 1,
            "covr.cold_start": 0, "covr.min_samples": 2, "eval.episodes": 1, "eval.every": 0,
        }  # fmt: skip
        for name, low in least.items():
            value: Any = self
            for part in name.split("."):
                value = getattr(value, part)
            if value < low:
                raise UserError(f"{name}={value} must be at least {low}")
        if self.vlm.temperature < 0:
            raise UserError(f"vlm.temperature={self.vlm.temperature} must not be negative")
        if (self.covr.publish_after or 0) < 0:
            raise UserError(f"covr.publish_after={self.covr.publish_after} must not be negative")
        if self.warmup < self.replay.n_step * self.env.num_envs:
            raise UserError(
                f"warmup={self.warmup} steps over env.num_envs={self.env.num_envs} environments hold no "
                f"{self.replay.n_step}-step transition yet when updates begin: raise warmup"
            )
        if self.warmup < self.replay.batch_size:
            raise UserError(
                f"replay.batch_size={self.replay.batch_size} is larger than what is stored when "
                f"updates begin (warmup={self.warmup} steps): raise warmup or lower the batch size"
            )
        if self.replay.capacity < self.warmup:
            raise UserError(f"replay.capacity={self.replay.capacity} is smaller than warmup={self.warmup}")
        if self.vlm.quantization in ("8bit", "4bit") and self.tuner.mode == "full":
            raise UserError(
                f"vlm.quantization={self.vlm.quantization!r} makes weights that tuner.mode='full' cannot "
                "train: use tuner.mode='lora'"
            )
        if self.vlm.background and self.vlm.between == "hold":
            raise UserError(
                "vlm.between='hold' needs the answer in the step: use 'mask' or leave vlm.background"
            )
        if self.vlm.refresh_priors and not self.vlm.background:
            raise UserError("vlm.refresh_priors labels in the background: set vlm.background too")
        if self.covr.publish_after is not None and not self.tuner.overlap:
            raise UserError("covr.publish_after delays overlapped rounds: set tuner.overlap too")
        if self.vlm.motion and not (self.env.grayscale and self.env.frame_stack >= 3):
            raise UserError(
                "vlm.motion shows three grey frames as one image: set env.grayscale and env.frame_stack=3"
            )
        if not 0 <= self.replay.gamma <= 1:
            raise UserError(f"replay.gamma={self.replay.gamma} must lie in [0, 1]")
        if self.replay.augment == "crop" and min(self.env.height, self.env.width) <= 2 * self.replay.pad:
            raise UserError(
                f"replay.pad={self.replay.pad} crops away all of a {self.env.height}x{self.env.width} frame"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for config.json."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> TrainConfig:
        """The inverse of to_dict, as read back from config.json.

        Raises:
            UserError: a section is missing, or a setting is unknown; the message suggests near names.
        """
        nested = {
            "env": EnvConfig, "agent": SACConfig, "replay": ReplayConfig, "vlm": VLMConfig,
            "tuner": TunerConfig, "covr": COVRConfig, "eval": EvalConfig,
        }  # fmt: skip
        known = {part.name for part in fields(TrainConfig)}
        known |= {f"{name}.{part.name}" for name, cls in nested.items() for part in fields(cls)}
        try:
            for key in [*data, *(f"{name}.{key}" for name in nested for key in data[name])]:
                if key not in known:
                    raise UserError(f"{unknown('setting', key, known)} (rename it there, or remove it)")
            parts = {name: cls(**data[name]) for name, cls in nested.items()}
            config = TrainConfig(**{**data, **parts})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"config.json does not fit this version of covr_fast: {error}") from error
        # JSON has no tuples.
        config.agent.channels, config.agent.strides = (
            tuple(config.agent.channels),
            tuple(config.agent.strides),
        )
        return config


@dataclass(frozen=True)
class Preset:
    """A named starting point; every field of it can be overridden."""

    summary: str
    config: TrainConfig

    def build(self) -> TrainConfig:
        return TrainConfig.from_dict(self.config.to_dict())


def _car_racing() -> TrainConfig:
    """Ten minutes on two CPU cores; what was tried on the way to it is in docs/carracing.md."""
    return TrainConfig(
        steps=28_000,
        warmup=2_000,
        steps_per_update=4,
        env=EnvConfig(height=56, width=56, grayscale=True, max_episode_steps=400),
        agent=SACConfig(channels=(16, 32, 32), strides=(3, 2, 2), latent=64, hidden=256, prior_weight=0.25),
        replay=ReplayConfig(capacity=28_000, batch_size=128, n_step=3, gamma=0.98),
        tuner=TunerConfig(
            mode="full",
            learning_rate=2e-3,
            average=0.98,
            label_smoothing=0.0,
            epochs=40,
            max_steps=400,
            batch_size=128,
            micro_batch=32,
            shift=4,
        ),
        vlm=VLMConfig(decimals=1, motion=True),
        covr=COVRConfig(psi_0=2500, cold_start=2, horizon=30),
    )


def _car_racing_gpu() -> TrainConfig:
    return TrainConfig(
        steps=500_000,
        warmup=5_000,
        env=EnvConfig(num_envs=64, batch_size=32, num_threads=8),
        agent=SACConfig(prior_weight=2.0),
        replay=ReplayConfig(capacity=500_000, n_step=3),
        vlm=VLMConfig(model="Qwen/Qwen2.5-VL-3B-Instruct"),
    )


def _dm_control(env_id: str, action_repeat: int) -> TrainConfig:
    """The paper's DMControl settings: 100k environment steps, lambda 1, cold start 4, LoRA 128/16."""
    return TrainConfig(
        steps=100_000,
        env=EnvConfig(
            id=env_id,
            num_envs=4,
            batch_size=2,
            height=100,
            width=100,
            action_repeat=action_repeat,
            max_episode_steps=1000,
        ),
        agent=SACConfig(prior_weight=1.0),
        replay=ReplayConfig(pad=8),
        tuner=TunerConfig(lora_alpha=16),
        covr=COVRConfig(cold_start=4),
    )


PRESETS: dict[str, Preset] = {
    "carracing": Preset(
        "CarRacing on two CPU cores in ten minutes, with the untrained nano VLM", _car_racing()
    ),
    "carracing-gpu": Preset("CarRacing at full size on one GPU, with Qwen2.5-VL-3B", _car_racing_gpu()),
    "cartpole-swingup": Preset("DMControl Cartpole Swingup", _dm_control("CartpoleSwingup-v1", 8)),
    "reacher-easy": Preset("DMControl Reacher Easy", _dm_control("ReacherEasy-v1", 4)),
    "cheetah-run": Preset("DMControl Cheetah Run", _dm_control("CheetahRun-v1", 4)),
    "walker-walk": Preset("DMControl Walker Walk", _dm_control("WalkerWalk-v1", 2)),
    "finger-spin": Preset("DMControl Finger Spin", _dm_control("FingerSpin-v1", 2)),
    "ball-in-cup-catch": Preset("DMControl Ball in Cup Catch", _dm_control("BallInCupCatch-v1", 4)),
}
