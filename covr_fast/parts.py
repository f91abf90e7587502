"""The parts of a run as its settings ask for them: the device and the replay buffer."""

import os

import torch

from .architectures import kernel_obstacle, warn_once
from .best_returns import SAMPLER as BEST_SAMPLER
from .buffer import ReplayBuffer
from .buffer.sampling import Sampling
from .config import TrainConfig
from .envs import PixelEnvs
from .errors import UserError


def compute_device(name: str) -> torch.device:
    """Where the agent and the VLM compute; "auto" is CUDA where there is a device. A GPU has its number.

    Raises:
        UserError: not a device, or one that torch does not see.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return _device(name, "device", "--device cpu, or check `covr-fast doctor`")


def replay_device(name: str, compute: torch.device) -> torch.device:
    """Where the replay buffer stores its frames; "auto" is where the agent computes, if it can be there.

    Raises:
        UserError: as for `compute_device`; or there are no kernels for the GPU.
    """
    if name == "auto":
        if compute.type == "cuda" and (obstacle := kernel_obstacle(compute)) is not None:
            warn_once(f"frames stay in host memory, and each batch is copied to {compute}: {obstacle}")
            return torch.device("cpu")
        return compute
    if name == "cuda" and compute.type == "cuda":
        device = compute
    else:
        device = _device(name, "replay.device", "--replay.device auto")
    if device.type == "cuda" and (obstacle := kernel_obstacle(device)) is not None:
        raise UserError(f"replay.device={name!r}, but {obstacle}: use --replay.device auto")
    return device


def _device(name: str, option: str, remedy: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise UserError(f"{option}={name!r} but torch sees no CUDA device: use {remedy}")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise UserError(f"{option}={name!r} but torch sees cuda:0 to cuda:{last} only: use {remedy}")
    return torch.device("cuda", index)


def use_tensor_cores(device: torch.device) -> None:
    """On a GPU, products of float32 matrices take TF32, as its convolutions do without being told. For the
    whole process."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def loop_threads(config: TrainConfig) -> int:
    """Threads of everything but the simulator, which keeps a core for itself: two thread pools on the same
    cores slow each other down."""
    return config.threads or max(1, (os.cpu_count() or 2) - config.env.num_threads)


def new_buffer(config: TrainConfig, envs: PixelEnvs, device: torch.device) -> ReplayBuffer:
    """The empty replay buffer D. Each transition has the VLM's prior, its mask and its version as extras."""
    (action_dim,) = envs.action_shape
    return ReplayBuffer(
        config.replay.capacity,
        num_envs=config.env.num_envs,
        obs_shape=envs.obs_shape,
        action_shape=envs.action_shape,
        frame_stack=config.env.frame_stack,
        n_step=config.replay.n_step,
        gamma=config.replay.gamma,
        sampler=BEST_SAMPLER if config.replay.sampler == "best" else config.replay.sampler,
        device=device,
        seed=config.seed,
        extras={"prior": (action_dim,), "prior_mask": (), "prior_version": ((), torch.int64)},
    )


def new_batches(config: TrainConfig, buffer: ReplayBuffer) -> Sampling:
    """The batches of policy updates."""
    replay, form = config.replay, config.agent.batch_form
    batches = buffer.sampling(
        replay.batch_size,
        augment=None if replay.augment == "none" else replay.augment,
        pad=replay.pad,
        dtype=form.dtype,
        memory_format=torch.contiguous_format if form.augments else torch.channels_last,
    )
    if replay.sampler == "best":
        batches.keep_priorities()
    return batches
