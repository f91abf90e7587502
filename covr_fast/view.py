"""What each learner gets of an observation: the agent a centre crop, the VLM one RGB image."""

import torch
from torch import Tensor

from .config import TrainConfig
from .envs import luma


def _margin(config: TrainConfig) -> int:
    return config.replay.pad if config.replay.augment == "crop" else 0


def agent_obs_shape(config: TrainConfig) -> tuple[int, int, int]:
    """Shape of the agent's observations: cropped if it trains on crops."""
    c, h, w = config.env.obs_shape
    m = _margin(config)
    return (c, h - 2 * m, w - 2 * m)


def agent_view(config: TrainConfig, obs: Tensor) -> Tensor:
    """uint8[n, C, H, W] -> its centre if the agent trains on random crops, else all of it."""
    _, h, w = agent_obs_shape(config)
    m = _margin(config)
    return obs[..., m : m + h, m : m + w]


def vlm_view(config: TrainConfig, obs: Tensor) -> Tensor:
    """uint8[n, C, H, W] stacks -> uint8[n, 3, H, W]: the newest frame. With `vlm.motion` the newest three
    frames, in grey, as red, green and blue, so that moving objects are coloured."""
    if not config.vlm.motion:
        return newest_frame(config, obs)
    frames = obs[:, -3 * config.env.channels :]
    return frames if config.env.grayscale else torch.cat([luma(f) for f in frames.split(3, dim=1)], dim=1)


def newest_frame(config: TrainConfig, obs: Tensor) -> Tensor:
    """uint8[n, C, H, W], stacks or single frames -> uint8[n, 3, H, W], the newest frame as RGB."""
    frame = obs[:, -config.env.channels :]
    return frame.expand(-1, 3, -1, -1) if config.env.grayscale else frame
