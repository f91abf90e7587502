"""Every setting of a run."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import numpy as np

from .agents.sac import SACConfig
from .envs import EnvConfig
from .errors import UserError, unknown
from .schedule import Rule
from .vlm import TunerConfig
from .vlm.model.nano import is_nano

FASTEST = {"lora": 1e-3, "full": 1e-4}
"""Learning rates above which fine-tuning a pretrained VLM is doubted, by tuner.mode."""
MOST_EPOCHS = 10
"""Passes over a round's samples above which the same is."""


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
    device: Literal["auto", "cpu", "cuda"] = "auto"
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
    attention: Literal[
        "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4"
    ] = "auto"
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
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints, from which a run goes on that was killed. They hold the replay buffer, and
    wait longer where writing it would take more than 2 % of the time. 0: only when the run ends or is
    interrupted."""
    checkpoint_every: int = 0
    """Environment steps between further checkpoints; 0: none."""
    save_replay: bool = False
    """Keep the replay buffer in the final checkpoint too, so that the run can be continued (--steps)."""
    env: EnvConfig = field(default_factory=EnvConfig)
    agent: SACConfig = field(default_factory=SACConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    vlm: VLMConfig = field(default_factory=VLMConfig)
    tuner: TunerConfig = field(default_factory=TunerConfig)
    covr: COVRConfig = field(default_factory=COVRConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    begun_as: str = ""
    """Name of the preset that the settings began as, for the record."""

    @staticmethod
    def preset(name: str, model: str | None = None) -> TrainConfig:
        """A preset by name, with the settings that suit `model`.

        How a VLM is shown frames and tuned depends on what it knows: what teaches nano's random weights
        destroys a pretrained model's.

        Args:
            name: of the preset; `covr-fast train --help` lists them.
            model: for `vlm.model`. None: the preset's own.

        Raises:
            UserError: no such preset; the message suggests near names.
        """
        from .presets import PRESETS

        if name not in PRESETS:
            raise unknown("preset", name, PRESETS)
        config = PRESETS[name].build(model)
        config.begun_as = name
        return config

    def check(self) -> None:
        """Raises a UserError for settings of a wrong type, or that do not fit together."""
        self.check_types()
        least = {
            "steps": 1, "seed": 0, "warmup": 1, "steps_per_update": 1, "log_every": 1, "checkpoint_every": 0,
            "checkpoint_minutes": 0, "threads": 0,
            "replay.batch_size": 1, "replay.n_step": 1, "replay.pad": 0, "vlm.every": 1, "vlm.decimals": 1,
            "covr.cold_start": 0, "covr.min_samples": 2, "eval.episodes": 1, "eval.every": 0,
        }  # fmt: skip
        for name, low in least.items():
            value: Any = self
            for part in name.split("."):
                value = getattr(value, part)
            if not value >= low:  # as NaN is not
                raise UserError(f"{name}={value} must be at least {low}")
        if self.vlm.decimals > 4:
            raise UserError(f"vlm.decimals={self.vlm.decimals} must be at most 4")
        if not self.vlm.temperature >= 0:
            raise UserError(f"vlm.temperature={self.vlm.temperature} must not be negative")
        if not 0 < self.agent.tau <= 1:
            raise UserError(f"agent.tau={self.agent.tau} must lie in (0, 1]")
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

    def check_types(self) -> None:
        """Raises a UserError for the first setting whose value is not of its field's type."""
        _check_types(self)

    def doubts(self) -> list[str]:
        """Settings that are allowed but do not suit the VLM, a sentence each that names the remedy."""
        vlm, tuner = self.vlm, self.tuner
        if is_nano(vlm.model):
            if tuner.mode == "full":
                return []
            return [
                f"tuner.mode='lora' adapts what a model knows, and vlm.model={vlm.model!r} began with random "
                "weights: use tuner.mode='full'"
            ]
        said = []
        run = Path(vlm.model).absolute().parent.parent
        if tuner.mode == "lora" and Path(vlm.model).name == "vlm" and (run / "config.json").is_file():
            said.append(
                f"vlm.model={vlm.model!r} is the checkpoint of {run}, which changes when that run goes on, "
                "and an adapter needs its base as it is: copy the folder to another place"
            )
        rate = FASTEST[tuner.mode]
        if tuner.learning_rate > rate:
            said.append(
                f"tuner.learning_rate={tuner.learning_rate:g} with tuner.mode={tuner.mode!r} is for random "
                f"weights, a pretrained model forgets what it knows: use at most {rate:g}"
            )
        if tuner.epochs > MOST_EPOCHS:
            said.append(
                f"tuner.epochs={tuner.epochs} is for random weights, a pretrained model learns the samples "
                f"by heart: use at most {MOST_EPOCHS}"
            )
        if vlm.motion:
            said.append(
                "vlm.motion shows three grey frames as false colours, which no pretrained model has seen: "
                "leave it off"
            )
        if self.env.grayscale:
            said.append("env.grayscale hides the colours that a pretrained model knows: leave it off")
        return said

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for config.json."""
        return _plain(asdict(self))

    @staticmethod
    def from_dict(data: dict[str, Any]) -> TrainConfig:
        """The inverse of to_dict, as read back from config.json. What is missing has its default: a later
        version may have more settings than the one that wrote it.

        Raises:
            UserError: a setting is unknown; the message suggests near names.
        """
        nested = {
            "env": EnvConfig, "agent": SACConfig, "replay": ReplayConfig, "vlm": VLMConfig,
            "tuner": TunerConfig, "covr": COVRConfig, "eval": EvalConfig,
        }  # fmt: skip
        known = {part.name for part in fields(TrainConfig)}
        known |= {f"{name}.{part.name}" for name, cls in nested.items() for part in fields(cls)}
        try:
            for key in [*data, *(f"{name}.{key}" for name in nested for key in data.get(name, {}))]:
                if key not in known:
                    raise UserError(f"{unknown('setting', key, known)} (rename it there, or remove it)")
            parts = {name: cls(**data.get(name, {})) for name, cls in nested.items()}
            config = TrainConfig(**{**data, **parts})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"config.json does not fit this version of covr_fast: {error}") from error
        # JSON has no tuples.
        config.agent.channels, config.agent.strides = (
            tuple(config.agent.channels),
            tuple(config.agent.strides),
        )
        return config


def _check_types(config: Any, section: str = "") -> None:
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if is_dataclass(hint) and isinstance(value, cast(type, hint)):
            _check_types(value, f"{name}.")
        elif not _fits(value, hint):
            expected = " or ".join(repr(a) for a in get_args(hint)) if get_origin(hint) is Literal else hint
            expected = getattr(expected, "__name__", str(expected))
            raise UserError(f"{section}{name}={value!r} must be {expected}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type; numpy's numbers are numbers, and paths are text."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in inner
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is tuple:
        return isinstance(value, (tuple, list)) and all(_fits(each, inner[0]) for each in value)
    kinds: dict[Any, tuple[type, ...]] = {
        int: (Integral,), float: (Real,), str: (str, os.PathLike), bool: (bool, np.bool_),
    }  # fmt: skip
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, kinds.get(hint, (hint,))) if isinstance(hint, type) else True


def _plain(value: Any) -> Any:
    """Numpy's scalars and paths as what JSON has for them."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(each) for each in value)
    if isinstance(value, np.generic):
        return value.item()
    return os.fspath(value) if isinstance(value, os.PathLike) else value
