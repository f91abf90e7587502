"""Frames to the pixel values of vision towers with one input size, as a batch on the frames' device.

transformers' image processors convert one image at a time, on the CPU. Here the frames of a call have one
size, so the same steps are a few tensor operations for all of them. The bytes are equal to the processor's
(`resample`); the numbers made of them differ by float32's rounding.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .resample import FILTERS, resize

_CLIP, _SMOLVLM = ("CLIPImageProcessor", "LlavaImageProcessor"), ("SmolVLMImageProcessor",)


class Normalizer:
    """What a processor makes of a byte: (byte * factor - mean) / std, per channel, in float32."""

    def __init__(self, image_processor: Any) -> None:
        p = image_processor
        factor = p.rescale_factor if p.do_rescale else 1.0
        mean, std = (p.image_mean, p.image_std) if p.do_normalize else (0.0, 1.0)
        mean, std = (torch.as_tensor(x, dtype=torch.float64, device="cpu").expand(3) for x in (mean, std))
        cpu = torch.device("cpu")
        self._scales = {cpu: ((factor / std).float(), (mean / std).float())}
        """Per device float32[3] each: the result for a byte is byte * scale - offset."""

    def __call__(self, images: Tensor) -> Tensor:
        """uint8[..., 3, H, W] -> float32 of the same shape."""
        device = images.device
        if device not in self._scales:  # copied there once, because the host waits for such a copy
            scale, offset = self._scales[torch.device("cpu")]
            self._scales[device] = scale.to(device), offset.to(device)
        scale, offset = (x.view(3, 1, 1) for x in self._scales[device])
        return images.float().mul_(scale).sub_(offset)


class FramePixels:
    """The same as an image processor of CLIP, LLaVA or SmolVLM with its settings, for frames of one size.

    Raises:
        ValueError: it is another processor, or has settings that are not supported; the message names them.
    """

    def __init__(self, image_processor: Any) -> None:
        self._processor = p = image_processor
        kind = type(p).__name__.removesuffix("Pil")
        if kind not in (*_CLIP, *_SMOLVLM):
            raise ValueError(f"{kind} is not supported")
        self._sizes = _clip_sizes if kind in _CLIP else _smolvlm_sizes
        wrong = _clip_obstacles(p) if kind in _CLIP else _smolvlm_obstacles(p)
        wrong += [] if p.do_resize else ["do_resize"]
        wrong += [] if p.resample in FILTERS else ["resample"]
        if wrong:
            settings = ", ".join(f"{name}={getattr(p, name)}" for name in wrong)
            raise ValueError(f"{kind} with {settings} is not supported")
        crop = kind in _CLIP and p.do_center_crop
        self._crop = (p.crop_size["height"], p.crop_size["width"]) if crop else None
        self._normalize = Normalizer(p)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8[B, 3, H, W] -> float32[B, 3, h, w]."""
        sizes = self._sizes(self._processor, images.shape[2], images.shape[3])
        images = resize(images, sizes, int(self._processor.resample))
        if self._crop is not None:
            top, left = ((old - new) // 2 for old, new in zip(sizes[-1], self._crop, strict=True))
            images = images[..., top : top + self._crop[0], left : left + self._crop[1]]
        return self._normalize(images)


def _clip_obstacles(p: Any) -> list[str]:
    """The settings of an image processor of CLIP or LLaVA that `FramePixels` does not support."""
    size: dict[str, Any] = dict(p.size)
    wrong = ["do_pad"] if p.do_pad else []
    if set(size) not in ({"shortest_edge"}, {"height", "width"}):
        return [*wrong, "size"]
    sides = {side: size.get(side, size.get("shortest_edge")) for side in ("height", "width")}
    if p.do_center_crop and any(p.crop_size[side] > length for side, length in sides.items()):
        wrong.append("crop_size")  # it would pad the frame
    return wrong


def _clip_sizes(p: Any, height: int, width: int) -> list[tuple[int, int]]:
    """The size that a frame is resized to."""
    size = dict(p.size)
    if "shortest_edge" not in size:
        return [(size["height"], size["width"])]
    short = size["shortest_edge"]
    long = int(short * max(height, width) / min(height, width))
    return [(long, short) if height > width else (short, long)]


def _smolvlm_obstacles(p: Any) -> list[str]:
    """The same for SmolVLM."""
    wrong = [] if set(dict(p.size)) == {"longest_edge"} else ["size"]
    return wrong + (["do_image_splitting"] if p.do_image_splitting else [])


def _smolvlm_sizes(p: Any, height: int, width: int) -> list[tuple[int, int]]:
    """Both sizes that a frame is resized to, one after the other."""
    from transformers.models.smolvlm.image_processing_pil_smolvlm import get_resize_output_image_size

    frame = np.broadcast_to(np.uint8(0), (height, width))  # only its shape is looked at
    edge = p.max_image_size["longest_edge"]
    return [get_resize_output_image_size(frame, p.size["longest_edge"]), (edge, edge)]
