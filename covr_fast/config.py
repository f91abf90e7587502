"""All settings of a run."""

import os
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import numpy as np

from .agents import AgentConfig, Kind
from .custom import doubts
from .env_config import EnvConfig
from .errors import UserError, unknown
from .files import full_names
from .methods import METHODS, roles_of
from .schedule import Rule
from .vlm import TunerConfig
from .vlm.model.nano import is_nano

FASTEST = {"lora": 1e-3, "full": 1e-4}
"""By tuner.mode, the highest learning rate for a pretrained VLM; `doubts` warns above it."""
MOST_EPOCHS = 10
"""Most passes over a round's samples for a pretrained VLM; `doubts` warns above it."""


@dataclass
class ReplayConfig:
    """The replay buffer D."""

    capacity: int = 100_000
    """Most transitions stored, over all environments. Each costs about the memory of one frame."""
    batch_size: int = 256
    """Transitions per update."""
    n_step: int = 1
    """Rewards summed before the bootstrap."""
    gamma: float = 0.99
    """Discount per decision, in the Bellman target and in the returns that EDDF filters."""
    sampler: Literal["uniform", "prioritized", "recent", "best"] = "uniform"
    """How transitions are drawn; best: half of them from those of finished episodes with the highest
    returns, half from all."""
    best_share: float = 0.5
    """With sampler="best", share of the transitions of finished episodes that count as best."""
    augment: Literal["none", "shift", "crop", "translate"] = "crop"
    """Random crop or random translation (RAD), random shift (DrQ), or none."""
    pad: int = 4
    """Pixels on each side: that a crop removes, that a translation adds, black, or by which a shift moves."""
    device: str = "auto"
    """Where frames are stored: auto (where the agent computes), cpu, cuda, or a GPU by number: cuda:1."""


@dataclass
class VLMConfig:
    """The vision-language model (VLM), and when and how it answers."""

    model: str = "nano"
    """A checkpoint directory or hub id of a Qwen2.5-VL; "nano": the same architecture, tiny and untrained."""
    prompt: str | None = None
    """What the VLM is told, with the format of the answer. None: the words of the environment's task."""
    decimals: int = 2
    """Digits after the point in the action text."""
    image_size: int = 0
    """The longer side of the frames as the VLM sees them, in pixels; 0: frames as they are. `covr-fast bench`
    shows tokens and time by size."""
    attention: Literal[
        "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4"
    ] = "auto"
    """auto takes the first that works: flash_attention_4, 3 or 2, sdpa, eager."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights. auto: that of a saved model, else bfloat16 on a GPU, float32 on a CPU."""
    quantization: Literal["auto", "none", "8bit", "4bit"] = "auto"
    """Store the linear layers in 8 or 4 bits (bitsandbytes), for tuner.mode="lora". auto: like the base of a
    saved adapter, else like the checkpoint."""
    every: int = 10
    """Environment steps of an environment between two priors of the VLM (the paper: 10). No decision gets
    two: with a longer env.action_repeat each gets one."""
    between: Literal["mask", "hold"] = "mask"
    """Transitions between two priors: left out of Eq. 4 (mask), or used with the last prior (hold)."""
    temperature: float = 0.0
    """Sampling temperature of the answers; 0 takes the likeliest."""
    background: bool = False
    """A thread gives stored transitions their priors while the simulation goes on; results then depend on
    timing. False: the step waits for the prior, as in the paper."""
    refresh_priors: bool = False
    """With `background`, give stored transitions new priors after each round. The paper does not."""
    max_staleness: int | None = None
    """Most versions of the weights (published rounds) by which a stored prior may be older than the newest;
    older priors are masked out of Eq. 4, for good. None: all guide, as in the paper."""
    graph: bool = True
    """On a GPU, decode answers with CUDA graphs (2.7 times as fast as kernel by kernel: benchmarks/GPU.md);
    not with quantized layers. A CPU ignores it."""
    motion: bool = False
    """Show the newest three frames, in grey, as red, green and blue, so one image shows motion. False: show
    the newest frame."""


@dataclass
class COVRConfig:
    """Who does what, the filter, the schedule of rounds and the guidance."""

    vlm: Literal["tuned", "frozen", "off"] = "tuned"
    """What becomes of the VLM: it is tuned in rounds, stays as it comes, or is not even loaded. What
    a run's method says of it: give `method` (`--covr off` is `--method off`)."""
    decides: Literal["agent", "vlm"] = "agent"
    """Whose actions are executed. vlm: no agent is trained. This is the method's to say, too."""
    psi_0: int = 5000
    """Environment steps before the first fine-tuning round."""
    schedule: Rule = "linear"
    """How the steps between rounds grow; see FineTuneSchedule."""
    threshold: Literal["described", "equation"] = "described"
    """Sign of the entropy in Eq. 5: Sigmoid(-H) as the text describes, or Sigmoid(+H) as printed."""
    entropy: Literal["sum", "mean"] = "sum"
    """H in Eq. 5: the policy's entropy, a sum over the numbers of an action as in the paper, or its mean per
    number, which does not saturate the sigmoid when actions have many."""
    cold_start: int = 2
    """Rounds that must have tuned the VLM before its priors guide the actor (the paper: 2 on CARLA, 4 on
    DMControl). A round whose filter kept nothing to learn from does not count."""
    trust_from: Literal["round", "start"] = "round"
    """Priors that were given before the cold start's end: never guide (round), or guide after it (start)."""
    normalise: Literal["guided", "batch"] = "guided"
    """Eq. 4 averages over the transitions of a batch that carry a prior (guided), or over all (batch), where
    the same lambda weighs about vlm.every times less. The paper does not say."""
    distance: Literal["sample", "mean"] = "sample"
    """Eq. 4 measures from the actor's sampled action, as the paper's a_r, or from its mean action, which
    leaves its entropy to the temperature."""
    decay: float = 0.0
    """Share of the run's steps in which lambda falls linearly to 0; 0: it stays, as in the paper."""
    filter: Literal["eddf", "top", "random"] = "eddf"
    """Which samples of D_f the VLM learns from: those above the threshold of Eq. 5 (EDDF), the top_share of
    them with the highest returns, or as many random ones as EDDF would keep."""
    top_share: float = 0.8
    """With filter="top", share of the samples that is kept."""
    z_score: bool = True
    """Take the threshold of Eq. 5 over z-scores. False: in units of the return, where it keeps the same
    samples, because z-scores are linear in returns."""
    score: Literal["return", "reward", "q"] = "return"
    """What samples are filtered and weighted by: the discounted return g_t, the reward r_t, or the critic's
    Q(s_t, a_t) when the round begins."""
    weights: Literal["returns", "equal", "random"] = "returns"
    """What weighs a kept sample in the loss of Eq. 6: its return (RALW), 1, or a random number in [0, 1)."""
    min_samples: int = 256
    """Fewest samples of finished episodes (D_f) for a round; it waits for them."""
    horizon: int | None = None
    """Decisions whose reward is in a return g_t. None: up to the end of the episode, as in the paper."""
    bootstrap: bool = False
    """Add the critic's value of the last state to the returns of truncated episodes. False: a truncated tail
    counts as the end, as in the paper."""
    confidence: bool = False
    """Weight the prior of each transition in Eq. 4 by how sure the VLM was of it: 1 - entropy / log of the
    grid's size (docs/vlm.md). The paper weights all alike."""
    publish_after: int | None = None
    """With tuner.overlap, publish a round exactly this many environment steps after its start, and wait
    for it if necessary, so that reruns are bit-identical. None: as soon as it is done."""


@dataclass
class EvalConfig:
    """Evaluation of the actor, which then acts without the VLM."""

    episodes: int = 10
    """Episodes per evaluation."""
    every: int = 0
    """Environment steps between evaluations during training, of the policy that decides; 0: only at the
    end."""
    vlm: bool = True
    """Before and after training, also evaluate the VLM alone, which then makes every decision."""
    rounds: bool = False
    """Also evaluate it after each round of fine-tuning, if there are any."""
    seed: int = 1_000_000
    """Seed of the first environment of evaluations; training uses others."""


@dataclass
class TrainConfig:
    """A run of COVR."""

    steps: int = 100_000
    """Environment steps, summed over environments: simulator frames, env.action_repeat of them for each
    decision of the agent."""
    warmup: int = 4000
    """Environment steps of random actions before the actor takes over and updates begin."""
    decisions_per_update: int = 2
    """Decisions, summed over environments, per policy update."""
    seed: int = 0
    """Seed of everything. The same seed gives the same run, bit for bit, unless parts run in the
    background."""
    device: str = "auto"
    """Where the agent and the VLM compute: auto, cpu, cuda (the first GPU), or one by number: cuda:1."""
    threads: int = 0
    """Threads of the policy update on a CPU. 0: all cores that the simulator leaves free."""
    log_every: int = 1000
    """Environment steps between lines of metrics."""
    video: bool = True
    """Record a video of an evaluation episode at the end."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints, from which a killed run can be resumed. They contain the replay buffer,
    and are less frequent if writing takes more than 2 % of the time. 0: only when the run ends or is
    interrupted."""
    checkpoint_every: int = 0
    """Environment steps between additional checkpoints; 0: none."""
    save_replay: bool = False
    """Also write the replay buffer into the final checkpoint, so that the run can train on (--steps)."""
    env: EnvConfig = field(default_factory=EnvConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    vlm: VLMConfig = field(default_factory=VLMConfig)
    tuner: TunerConfig = field(default_factory=TunerConfig)
    covr: COVRConfig = field(default_factory=COVRConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    begun_as: str = ""
    """Name of the preset from which the settings were made. Only a record."""
    method: str = "covr"
    """COVR, a baseline or an ablation, whose settings the preset takes: covr, off, vbe, dpl, apl, vpf, per,
    ere, m1 to m11 (docs/sweeps.md). Only a record."""

    @staticmethod
    def preset(
        name: str, model: str | None = None, agent: str | None = None, method: str = "covr"
    ) -> "TrainConfig":
        """A preset by name, with the settings that suit `model` and `agent`, and those of a method.

        What suits a VLM depends on what it knows: the tuning that teaches nano's random weights destroys the
        knowledge of a pretrained model.

        Args:
            name: of the preset; `covr-fast train --help` lists them.
            model: for `vlm.model`. None: that of the preset.
            agent: for `agent.kind`, with the settings of its publication. None: that of the preset.
            method: COVR, a baseline or an ablation; `covr-fast train --help` lists them.

        Raises:
            UserError: unknown preset, kind of agent or method; the message suggests similar names.
        """
        from .presets import PRESETS

        if name not in PRESETS:
            raise unknown("preset", name, PRESETS)
        preset = PRESETS[name]
        model = preset.model if model is None else model
        kind = preset.agent if agent is None else agent
        if kind not in get_args(Kind):
            raise unknown("kind of agent", kind, get_args(Kind))
        if method not in METHODS:
            raise unknown("method", method, METHODS)
        config = preset.make(is_nano(model), cast(Kind, kind))
        config.vlm.model, config.begun_as, config.method = model, name, method
        METHODS[method].change(config)
        return config

    @property
    def has_agent(self) -> bool:
        """Whether a run trains an agent."""
        return self.covr.decides == "agent"

    @property
    def has_vlm(self) -> bool:
        """Whether a run loads a VLM."""
        return self.covr.vlm != "off"

    @property
    def has_rounds(self) -> bool:
        """Whether a run tunes its VLM."""
        return self.covr.vlm == "tuned"

    @property
    def learns(self) -> bool:
        """Whether a run trains anything. If not, it takes no steps and only evaluates."""
        return self.has_agent or self.has_rounds

    def check(self) -> None:
        """Raises a UserError for settings that have a wrong type or value, or do not fit together."""
        check_types(self)
        least = {
            "steps": 1, "seed": 0, "warmup": 1, "decisions_per_update": 1, "log_every": 1,
            "checkpoint_every": 0, "checkpoint_minutes": 0, "threads": 0,
            "replay.batch_size": 1, "replay.n_step": 1, "replay.pad": 0, "vlm.every": 1, "vlm.decimals": 1,
            "vlm.image_size": 0,
            "covr.cold_start": 0, "covr.min_samples": 2, "covr.decay": 0, "eval.episodes": 1, "eval.every": 0,
        }  # fmt: skip
        values = full_names(self.to_dict())
        for name, low in least.items():
            if not values[name] >= low:  # also for NaN
                raise UserError(f"{name}={values[name]} must be at least {low}")
        for option, device in ("device", self.device), ("replay.device", self.replay.device):
            if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
                raise UserError(f"{option}={device!r} must be auto, cpu, cuda or a GPU by number: cuda:1")
        if self.vlm.decimals > 4:
            raise UserError(f"vlm.decimals={self.vlm.decimals} must be at most 4")
        if not self.vlm.temperature >= 0:
            raise UserError(f"vlm.temperature={self.vlm.temperature} must not be negative")
        self.agent.check()
        if self.agent.kind == "deepmdp" and self.replay.n_step > 1:
            raise UserError(
                f"replay.n_step={self.replay.n_step}, but the models of agent.kind='deepmdp' predict one "
                "step: set replay.n_step=1"
            )
        if self.agent.batch_form.augments and self.replay.augment != "none":
            raise UserError(
                f"replay.augment={self.replay.augment!r}, but agent.kind={self.agent.kind!r} augments its "
                "batches itself: set replay.augment='none'"
            )
        self._check_roles()
        for name in ("replay.best_share", "covr.top_share"):
            if not 0 < values[name] <= 1:
                raise UserError(f"{name}={values[name]} must be above 0 and at most 1")
        if self.covr.decay > 1:
            raise UserError(f"covr.decay={self.covr.decay} must be a share of the steps, at most 1")
        for name in ("covr.publish_after", "vlm.max_staleness"):
            if (values[name] or 0) < 0:
                raise UserError(f"{name}={values[name]} must not be negative")
        if self.has_agent:
            self._check_begin_of_updates()
        if self.has_vlm:
            self._check_vlm()
        if not 0 <= self.replay.gamma <= 1:
            raise UserError(f"replay.gamma={self.replay.gamma} must lie in [0, 1]")
        if self.replay.pad > 1024:
            raise UserError(f"replay.pad={self.replay.pad} must be at most 1024")
        if self.replay.augment == "crop" and min(self.env.height, self.env.width) <= 2 * self.replay.pad:
            raise UserError(
                f"replay.pad={self.replay.pad} crops away all of a {self.env.height}x{self.env.width} frame"
            )

    def _check_begin_of_updates(self) -> None:
        """Raises a UserError if the warm-up stores too little, or too much, for updates to begin."""
        begun = self.decisions(self.warmup)
        warmup = f"warmup={self.warmup} steps of env.action_repeat={self.env.action_repeat}"
        if begun < self.replay.n_step * self.env.num_envs:
            raise UserError(
                f"{warmup} over env.num_envs={self.env.num_envs} environments hold no "
                f"{self.replay.n_step}-step transition yet when updates begin: raise warmup"
            )
        if begun < self.replay.batch_size:
            raise UserError(
                f"replay.batch_size={self.replay.batch_size} is larger than what is stored when updates "
                f"begin ({warmup}, so {begun} decisions): raise warmup or lower the batch size"
            )
        if self.replay.capacity < begun:
            raise UserError(
                f"replay.capacity={self.replay.capacity} is smaller than the {begun} decisions of {warmup}"
            )

    def _check_vlm(self) -> None:
        """Raises a UserError for settings of the VLM that do not fit together."""
        if self.has_rounds and self.vlm.quantization in ("8bit", "4bit") and self.tuner.mode == "full":
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
        if self.vlm.motion and self.env.frame_stack < 3:
            raise UserError("vlm.motion shows three frames as one image: set env.frame_stack=3")

    def _check_roles(self) -> None:
        """Raises a UserError if agent and VLM cannot have the parts that they are given."""
        covr = self.covr
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        if covr.decides == "vlm" and covr.vlm == "off":
            raise UserError("covr.decides='vlm', but covr.vlm='off' loads none: choose tuned or frozen")
        if covr.vlm == "frozen" and covr.decides == "agent" and covr.cold_start:
            raise UserError(
                f"covr.cold_start={covr.cold_start} rounds never come with covr.vlm='frozen', so the VLM "
                "would never guide: set covr.cold_start=0"
            )
        fitting = [name for name in METHODS if roles_of(name) == (covr.vlm, covr.decides)]
        if self.method not in fitting:
            raise UserError(
                f"covr.vlm={covr.vlm!r} and covr.decides={covr.decides!r} are not what method="
                f"{self.method!r} is: leave them out, or give a method that has them: {', '.join(fitting)}"
            )
        if covr.decides == "vlm" and covr.score == "q":
            raise UserError("covr.score='q' is the critic's, and with covr.decides='vlm' no agent is trained")
        if covr.decides == "vlm" and covr.bootstrap:
            raise UserError("covr.bootstrap asks the critic, and with covr.decides='vlm' no agent is trained")
        if covr.decides == "vlm" and self.vlm.background:
            raise UserError("covr.decides='vlm' needs the answer in the step: leave vlm.background")

    def decisions(self, steps: int) -> int:
        """Decisions that make `steps` environment steps, the last one perhaps begun earlier."""
        return -(-steps // self.env.action_repeat)

    def doubts(self) -> list[str]:
        """Warnings about settings that are allowed. Each names the remedy."""
        return [*doubts(self.env), *self._doubts_of_vlm()]

    def _doubts_of_vlm(self) -> list[str]:
        """Settings that do not suit the VLM."""
        vlm, tuner = self.vlm, self.tuner
        if is_nano(vlm.model):
            if tuner.mode == "full" or not self.has_rounds:
                return []
            return [
                f"tuner.mode='lora' adapts what a model knows, and vlm.model={vlm.model!r} began with random "
                "weights: use tuner.mode='full'"
            ]
        return [*(self._doubts_of_tuning() if self.has_rounds else ()), *self._doubts_of_pictures()]

    def _doubts_of_tuning(self) -> list[str]:
        vlm, tuner, said = self.vlm, self.tuner, []
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
        return said

    def _doubts_of_pictures(self) -> list[str]:
        said = []
        if self.vlm.motion:
            said.append(
                "vlm.motion shows three grey frames as false colours, which no pretrained model has seen: "
                "leave it off"
            )
        if self.env.grayscale:
            said.append("env.grayscale hides the colours that a pretrained model knows: leave it off")
        return said

    def to_dict(self) -> dict[str, Any]:
        """The settings in plain types, for config.json."""
        return dict(_plain(asdict(replace(self, env=self.env.recorded()))))

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "TrainConfig":
        """The inverse of to_dict, for the content of config.json. Missing settings get their defaults,
        because an older version may have written it.

        Raises:
            UserError: a setting is unknown; the message suggests similar names.
        """
        sections = {part.name: part.default_factory for part in fields(TrainConfig)}
        nested: dict[str, Any] = {name: cls for name, cls in sections.items() if is_dataclass(cls)}
        known = {part.name for part in fields(TrainConfig)}
        known |= {f"{name}.{part.name}" for name, cls in nested.items() for part in fields(cls)}
        try:
            if "steps_per_update" in data:
                raise UserError(
                    "config.json is of a version that counted decisions as steps: begin a new run, with "
                    "decisions_per_update for steps_per_update, and with steps, warmup, log_every, "
                    "checkpoint_every, eval.every, vlm.every, covr.psi_0 and covr.publish_after times "
                    "env.action_repeat"
                )
            for key in [*data, *(f"{name}.{key}" for name in nested for key in data.get(name, {}))]:
                if key not in known:
                    raise UserError(f"{unknown('setting', key, known)} (rename it there, or remove it)")
            parts = {name: cls(**data.get(name, {})) for name, cls in nested.items()}
            config = TrainConfig(**{**data, **parts})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"config.json does not fit this version of covr_fast: {error}") from error
        agent = config.agent
        agent.channels, agent.strides = tuple(agent.channels), tuple(agent.strides)  # JSON has no tuples
        return config


def located(model: str) -> str:
    """The name of a VLM that holds from every working directory: of a folder, its whole path."""
    return str(Path(model).resolve()) if model != "nano" and Path(model).is_dir() else model


def check_types(config: Any, section: str = "") -> None:
    """Raises a UserError for the first setting whose value is not of its field's type."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if is_dataclass(hint) and isinstance(value, cast(type, hint)):
            check_types(value, f"{name}.")
        elif not _fits(value, hint):
            expected = " or ".join(repr(a) for a in get_args(hint)) if get_origin(hint) is Literal else hint
            expected = getattr(expected, "__name__", str(expected))
            raise UserError(f"{section}{name}={value!r} must be {expected}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has a field's type. numpy's numbers count as numbers, and paths as text."""
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
    """Replaces numpy's scalars and paths by types that JSON has."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(each) for each in value)
    if isinstance(value, np.generic):
        return value.item()
    return os.fspath(value) if isinstance(value, os.PathLike) else value
