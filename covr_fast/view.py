"""What each learner gets of an observation: the agent its size of picture, the VLM one RGB image."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .config import TrainConfig
from .envs import luma


def _border(config: TrainConfig) -> int:
    """Pixels that the augmentation adds on each side; negative: that it removes."""
    sign = {"crop": -1, "translate": 1}.get(config.replay.augment, 0)
    return sign * config.replay.pad


def agent_obs_shape(config: TrainConfig) -> tuple[int, int, int]:
    """Shape of the agent's observations: smaller than the frames if it trains on random crops, larger if on
    random translations."""
    c, h, w = config.env.obs_shape
    border = _border(config)
    return (c, h + 2 * border, w + 2 * border)


def agent_view(config: TrainConfig, obs: Tensor) -> Tensor:
    """uint8[n, C, H, W] -> uint8[n, *agent_obs_shape]: the centre if the agent trains on random crops, the
    frame in the centre of black if on random translations, else the frame. As RAD acts and evaluates
    (center_crop_image and center_translate of its utils.py)."""
    border, (_, h, w) = _border(config), agent_obs_shape(config)
    if border > 0:
        return pad(obs, [border] * 4)
    return obs[..., -border : h - border, -border : w - border]


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
