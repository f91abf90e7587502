"""Named starting points; every field of one can be overridden.

A preset has settings for two kinds of VLM: nano, whose random weights learn everything from the agent on two
CPU cores, and pretrained models, whose knowledge is adapted. They differ in the images that the VLM gets, in
its fine-tuning, in the weight of its prior and, for nano, in a smaller agent. The rules of the environment
and the schedule are the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

from .agents.sac import SACConfig
from .config import COVRConfig, ReplayConfig, TrainConfig, VLMConfig
from .envs import EnvConfig
from .vlm import TunerConfig


@dataclass(frozen=True)
class Preset:
    """A named starting point."""

    summary: str
    make: Callable[[bool], TrainConfig]
    """The settings for nano (True), or for a pretrained VLM (False)."""
    model: str = "nano"
    """The VLM if none is given."""


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


def _vlm(nano: bool) -> VLMConfig:
    """Images and answers of the VLM: nano gets motion as false colours, and answers on a coarse grid. A
    pretrained model gets larger frames: 224x224 are 64 tokens of Qwen2.5-VL, 84x84 are 9."""
    return VLMConfig(decimals=1, motion=True) if nano else VLMConfig(image_size=224)


def _small_agent(prior_weight: float) -> SACConfig:
    """An agent for a CPU."""
    return SACConfig(
        channels=(16, 32, 32), strides=(3, 2, 2), latent=64, hidden=256, prior_weight=prior_weight
    )


def _car_racing(nano: bool) -> TrainConfig:
    """Ten minutes on two CPU cores. docs/carracing.md tells how these settings were found."""
    size = 56 if nano else 84
    return TrainConfig(
        steps=28_000,
        warmup=2_000,
        steps_per_update=4,
        env=EnvConfig(height=size, width=size, grayscale=nano, max_episode_steps=400),
        agent=_small_agent(0.25 if nano else 2.0),
        replay=ReplayConfig(capacity=28_000, batch_size=128, n_step=3, gamma=0.98),
        tuner=_tuner(nano),
        vlm=_vlm(nano),
        covr=COVRConfig(psi_0=2500, cold_start=2, horizon=30),
    )


def _car_racing_gpu(nano: bool) -> TrainConfig:
    return TrainConfig(
        steps=500_000,
        warmup=5_000,
        env=EnvConfig(num_envs=64, batch_size=32, num_threads=8, grayscale=nano),
        agent=SACConfig(prior_weight=0.25 if nano else 2.0),
        replay=ReplayConfig(capacity=500_000, n_step=3),
        tuner=_tuner(nano),
        vlm=_vlm(nano),
    )


def _dm_control(env_id: str, action_repeat: int, steps: int = 100_000) -> Callable[[bool], TrainConfig]:
    """The paper's settings for DMControl: lambda 1, cold start 4, LoRA 128/16, 100k steps (500k for its three
    hard tasks); with nano a smaller agent.

    Action repeats are those of CURL (Srinivas et al. 2020), which RAD has too: 8 for cartpole, 2 for finger
    and walker, else 4. No source names those of the hard three; the same rule gives 4, 2 and 4 (DrQ-v2 has 2
    for every task).
    """

    def make(nano: bool) -> TrainConfig:
        return TrainConfig(
            steps=steps,
            env=EnvConfig(
                id=env_id,
                num_envs=4,
                batch_size=2,
                height=100,
                width=100,
                grayscale=nano,
                action_repeat=action_repeat,
                max_episode_steps=1000,
            ),
            agent=_small_agent(0.25) if nano else SACConfig(prior_weight=1.0),
            replay=ReplayConfig(pad=8, batch_size=128 if nano else 256),
            tuner=_tuner(nano, lora_alpha=16),
            vlm=_vlm(nano),
            covr=COVRConfig(cold_start=4),
        )

    return make


PRESETS: dict[str, Preset] = {
    "carracing": Preset("CarRacing in a small picture, ten minutes on two CPU cores", _car_racing),
    "carracing-gpu": Preset(
        "CarRacing at full size on one GPU", _car_racing_gpu, "Qwen/Qwen2.5-VL-3B-Instruct"
    ),
    "cartpole-swingup": Preset("DMControl Cartpole Swingup", _dm_control("CartpoleSwingup-v1", 8)),
    "reacher-easy": Preset("DMControl Reacher Easy", _dm_control("ReacherEasy-v1", 4)),
    "cheetah-run": Preset("DMControl Cheetah Run", _dm_control("CheetahRun-v1", 4)),
    "walker-walk": Preset("DMControl Walker Walk", _dm_control("WalkerWalk-v1", 2)),
    "finger-spin": Preset("DMControl Finger Spin", _dm_control("FingerSpin-v1", 2)),
    "ball-in-cup-catch": Preset("DMControl Ball in Cup Catch", _dm_control("BallInCupCatch-v1", 4)),
    "hopper-hop": Preset("DMControl Hopper Hop", _dm_control("HopperHop-v1", 4, steps=500_000)),
    "walker-run": Preset("DMControl Walker Run", _dm_control("WalkerRun-v1", 2, steps=500_000)),
    "pendulum-swingup": Preset(
        "DMControl Pendulum Swingup", _dm_control("PendulumSwingup-v1", 4, steps=500_000)
    ),
}
