"""Named starting points; every field of one can be overridden.

A preset has settings for two kinds of VLM: nano, whose random weights learn everything from the agent on two
CPU cores, and pretrained models, whose knowledge is adapted. They differ in the images that the VLM gets, in
its fine-tuning and in the weight of its prior. It also has settings for each kind of agent
(`published.py`). The rules of the environment and the schedule are the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from .agents import AgentConfig, Kind
from .config import COVRConfig, EvalConfig, ReplayConfig, TrainConfig, VLMConfig
from .env_config import EnvConfig
from .published import learn_as_published
from .vlm import TunerConfig

_NANO_PRIOR_WEIGHT = 0.025
"""nano knows nothing before its first rounds, and its early priors are poor."""


@dataclass(frozen=True)
class Preset:
    """A named starting point."""

    summary: str
    make: Callable[[bool, Kind], TrainConfig]
    """The settings for nano (True) or a pretrained VLM (False), and a kind of agent."""
    model: str = "nano"
    """The VLM if none is given."""
    agent: Kind = "fast"
    """The kind of agent if none is given."""


def _tuner(nano: bool, lora_alpha: int = 256) -> TunerConfig:
    """Settings of a round: nano with all weights and for many epochs, a pretrained model as in the paper."""
    if not nano:
        return TunerConfig(lora_alpha=lora_alpha)
    return TunerConfig(
        mode="full",
        learning_rate=2e-3,
        average=0.98,
        label_smoothing=0.0,
        epochs=40,
        max_steps=400,
        batch_size=128,
        micro_batch=32,
        shift=4,
    )


def _vlm(nano: bool, every: int = 10) -> VLMConfig:
    """Images and answers of the VLM: nano gets motion as false colours, and answers on a coarse grid. A
    pretrained model gets larger frames: 224x224 are 64 tokens of Qwen2.5-VL, 84x84 are 9."""
    return VLMConfig(every=every, decimals=1, motion=True) if nano else VLMConfig(every=every, image_size=224)


def _small_agent() -> AgentConfig:
    """An agent for a CPU."""
    return AgentConfig(kind="fast", channels=(16, 32, 32), strides=(3, 2, 2), latent=64, hidden=256)


def _car_racing(episode: int, steps: int) -> Callable[[bool, Kind], TrainConfig]:
    """Small pictures, for two CPU cores. docs/carracing.md tells how these settings were found."""

    def make(nano: bool, kind: Kind) -> TrainConfig:
        size = 56 if nano else 84
        config = TrainConfig(
            steps=steps,
            warmup=8_000,
            decisions_per_update=4,
            log_every=4_000,
            env=EnvConfig(height=size, width=size, grayscale=nano, max_episode_steps=episode),
            agent=_small_agent(),
            replay=ReplayConfig(capacity=steps // 4, batch_size=128, n_step=3, gamma=0.98),
            tuner=_tuner(nano),
            vlm=_vlm(nano, every=40),
            covr=COVRConfig(psi_0=10_000, cold_start=2, horizon=30),
        )
        return _completed(config, nano, kind, prior_weight=2.0)

    return make


def _car_racing_gpu(nano: bool, kind: Kind) -> TrainConfig:
    config = TrainConfig(
        steps=2_000_000,
        warmup=20_000,
        log_every=4_000,
        env=EnvConfig(num_envs=64, batch_size=32, num_threads=8, grayscale=nano),
        replay=ReplayConfig(capacity=500_000, n_step=3),
        tuner=_tuner(nano),
        vlm=_vlm(nano, every=40),
        covr=COVRConfig(psi_0=20_000),
    )
    return _completed(config, nano, kind, prior_weight=2.0)


def _racetrack(nano: bool, kind: Kind) -> TrainConfig:
    """A lap and two thirds of a winding road. The car reacts within a second, so gamma is low."""
    size = 56 if nano else 84
    env = EnvConfig(
        id="racetrack-v0", height=size, width=size, grayscale=nano, action_repeat=1, max_episode_steps=300
    )
    config = TrainConfig(
        steps=40_000,
        warmup=1_000,
        decisions_per_update=2,
        env=env,
        agent=_small_agent(),
        replay=ReplayConfig(capacity=40_000, batch_size=64, n_step=3, gamma=0.9),
        tuner=_tuner(nano),
        vlm=_vlm(nano),
        covr=COVRConfig(psi_0=2_500, cold_start=2, horizon=30),
    )
    return _completed(config, nano, kind, prior_weight=2.0)


def _highway(nano: bool, kind: Kind) -> TrainConfig:
    """Four lanes with fifty cars: the counterpart of the paper's highway in CARLA. A step is a second."""
    env = EnvConfig(
        id="highway-v0", height=42, width=126, grayscale=nano, action_repeat=1, max_episode_steps=40
    )
    config = TrainConfig(
        steps=20_000,
        warmup=1_000,
        decisions_per_update=2,
        env=env,
        agent=_small_agent(),
        replay=ReplayConfig(capacity=20_000, batch_size=64, gamma=0.9),
        tuner=_tuner(nano),
        vlm=_vlm(nano, every=2),
        covr=COVRConfig(psi_0=2_000, cold_start=2),
    )
    return _completed(config, nano, kind, prior_weight=2.0)


def _custom(nano: bool, kind: Kind) -> TrainConfig:
    """A small task of the user's own, of which nothing is known: pictures small enough for two CPU cores, a
    decision and an update at every step, short rounds, and returns over 30 decisions, which need no end of an
    episode. examples/own_task.py is what it was tried on."""
    size = 56 if nano else 84
    env = EnvConfig(id="", num_envs=8, batch_size=4, height=size, width=size, grayscale=nano, action_repeat=1)
    config = TrainConfig(
        steps=10_000,
        warmup=500,
        decisions_per_update=1,
        env=env,
        agent=_small_agent(),
        replay=ReplayConfig(capacity=10_000, batch_size=64, n_step=3, gamma=0.95),
        tuner=replace(_tuner(nano, lora_alpha=16), max_steps=60) if nano else TunerConfig(lora_alpha=16),
        vlm=_vlm(nano),
        covr=COVRConfig(psi_0=1_000, cold_start=2, horizon=30),
    )
    return _completed(config, nano, kind, prior_weight=1.0)


def _dm_control(env_id: str, action_repeat: int, steps: int = 100_000) -> Callable[[bool, Kind], TrainConfig]:
    """The paper's settings for DMControl: lambda 1, cold start 4, LoRA 128/16, 100k environment steps (500k
    for its three hard tasks). One environment, as in the agents' papers.

    Action repeats are those of CURL (Srinivas et al. 2020), which RAD has too: 8 for cartpole, 2 for finger
    and walker, else 4. No source names those of the hard three; the same rule gives 4, 2 and 4 (DrQ-v2 has 2
    for every task).
    """

    def make(nano: bool, kind: Kind) -> TrainConfig:
        env = EnvConfig(
            id=env_id, num_envs=1, batch_size=1, action_repeat=action_repeat, max_episode_steps=1000
        )
        if kind == "fast":
            env.num_envs, env.batch_size, env.height, env.width, env.grayscale = 4, 2, 100, 100, nano
        config = TrainConfig(
            steps=steps,
            decisions_per_update=2,
            warmup=1000 * action_repeat,
            env=env,
            agent=_small_agent(),
            replay=ReplayConfig(pad=8, batch_size=128),
            tuner=_tuner(nano, lora_alpha=16),
            vlm=_vlm(nano),
            covr=COVRConfig(cold_start=4),
            eval=EvalConfig(every=10_000),
        )
        return _completed(config, nano, kind, prior_weight=1.0)

    return make


def _carla(env_id: str) -> Callable[[bool, Kind], TrainConfig]:
    """The paper's settings for CARLA: lambda 2, cold start 2, LoRA 128/256, 100k steps, episodes of at most
    1000 frames. One environment, and a decision for every frame, as in Xu et al. 2024 (DMR)."""

    def make(nano: bool, kind: Kind) -> TrainConfig:
        env = EnvConfig(
            id=env_id,
            num_envs=1,
            batch_size=1,
            height=100,
            width=100,
            grayscale=nano,
            action_repeat=1,
            max_episode_steps=1000,
        )
        config = TrainConfig(
            env=env,
            agent=_small_agent(),
            replay=ReplayConfig(pad=8, batch_size=128),
            tuner=_tuner(nano),
            vlm=_vlm(nano),
            covr=COVRConfig(cold_start=2),
        )
        return _completed(config, nano, kind, prior_weight=2.0)

    return make


def _completed(config: TrainConfig, nano: bool, kind: Kind, prior_weight: float) -> TrainConfig:
    """The same with a kind of agent, as published, and with lambda: nano's own, or that of the paper."""
    learn_as_published(config, kind)
    config.agent.prior_weight = _NANO_PRIOR_WEIGHT if nano else prior_weight
    return config


def _rad(summary: str, make: Callable[[bool, Kind], TrainConfig]) -> Preset:
    return Preset(summary, make, agent="rad")


PRESETS: dict[str, Preset] = {
    "carracing": Preset(
        "CarRacing in a small picture, ten minutes on two CPU cores", _car_racing(400, 112_000)
    ),
    "carracing-full": Preset(
        "CarRacing in a small picture, episodes of 1000 frames", _car_racing(1000, 400_000)
    ),
    "carracing-gpu": Preset(
        "CarRacing at full size on one GPU", _car_racing_gpu, "Qwen/Qwen2.5-VL-3B-Instruct"
    ),
    "racetrack": Preset("Steering along a winding road, on two CPU cores", _racetrack),
    "highway": Preset("Driving among fifty cars on four lanes, on two CPU cores", _highway),
    "custom": Preset("Your own environment, in a small picture, on two CPU cores", _custom),
    "cartpole-swingup": _rad("DMControl Cartpole Swingup", _dm_control("CartpoleSwingup-v1", 8)),
    "reacher-easy": _rad("DMControl Reacher Easy", _dm_control("ReacherEasy-v1", 4)),
    "cheetah-run": _rad("DMControl Cheetah Run", _dm_control("CheetahRun-v1", 4)),
    "walker-walk": _rad("DMControl Walker Walk", _dm_control("WalkerWalk-v1", 2)),
    "finger-spin": _rad("DMControl Finger Spin", _dm_control("FingerSpin-v1", 2)),
    "ball-in-cup-catch": _rad("DMControl Ball in Cup Catch", _dm_control("BallInCupCatch-v1", 4)),
    "hopper-hop": _rad("DMControl Hopper Hop", _dm_control("HopperHop-v1", 4, steps=500_000)),
    "walker-run": _rad("DMControl Walker Run", _dm_control("WalkerRun-v1", 2, steps=500_000)),
    "pendulum-swingup": _rad(
        "DMControl Pendulum Swingup", _dm_control("PendulumSwingup-v1", 4, steps=500_000)
    ),
    "carla-highway": Preset(
        "CARLA, a highway with traffic (needs a server: docs/carla.md)",
        _carla("carla-highway"),
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "rad",
    ),
    "carla-pedestrians": Preset(
        "CARLA, pedestrians behind parked cars (needs a server: docs/carla.md)",
        _carla("carla-pedestrians"),
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "rad",
    ),
}
