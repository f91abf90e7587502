"""Frames to the patches of the Qwen-VL family, as a batch on the frames' device.

transformers' image processors convert one image at a time with PIL. Here all frames of a call have one size,
so the same steps are four tensor operations for all of them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_BICUBIC = 3


class PatchPixels:
    """The same as transformers' `Qwen2VLImageProcessor` with its settings, for frames of one size."""

    def __init__(self, image_processor: Any) -> None:
        mode = image_processor.resample
        if int(mode) != _BICUBIC:
            raise ValueError(f"the image processor resamples with mode {mode}, not bicubic")
        self._processor = image_processor
        self.patch = image_processor.patch_size
        self.merge = image_processor.merge_size
        self.frames = image_processor.temporal_patch_size
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device="cpu").view(1, -1, 1, 1, 1)
            for values in (image_processor.image_mean, image_processor.image_std)
        )
        self._scales = {mean.device: (1 / (255 * std), mean / std)}
        """Per device float32[1, 3, 1, 1, 1] each: the model's input for a byte is byte * scale - offset."""

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """The size that the model sees, a multiple of `patch * merge` within the processor's pixel limits."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        limits, factor = self._processor.size, self.patch * self.merge
        size = smart_resize(height, width, factor, limits["shortest_edge"], limits["longest_edge"])
        return size[0], size[1]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches in height and width."""
        height, width = self.resized(height, width)
        return height // self.patch, width // self.patch

    def __call__(self, images: Tensor) -> Tensor:
        """uint8[B, 3, H, W] -> float32[B * patches, 3 * frames * patch * patch]."""
        batch, channels, height, width = images.shape
        size = self.resized(height, width)
        if size != (height, width):
            images = _resize(_resize(images, (height, size[1])), size)
        m, p = self.merge, self.patch
        rows, columns = size[0] // p, size[1] // p
        blocks = images.reshape(batch, channels, rows // m, m, p, columns // m, m, p)
        # Patches of one merged token lie together: [B, rows/m, columns/m, m, m, C, p, p]. Reordered as bytes,
        # before they become floats of four times the size.
        blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, channels, 1, p, p).float()
        scale, offset = self._scale(images.device)
        blocks.mul_(scale).sub_(offset)
        # A still image is repeated to fill the temporal patch.
        return blocks.expand(-1, -1, self.frames, -1, -1).reshape(len(blocks), -1)

    def _scale(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Scale and offset on a device. Copied there once, because the host waits for such a copy."""
        if device not in self._scales:
            scale, offset = self._scales[torch.device("cpu")]
            self._scales[device] = scale.to(device), offset.to(device)
        return self._scales[device]


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """One pass of Pillow's resampling: it rounds and clips to bytes after the width and after the height."""
    resized = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
    return resized.round_().clamp_(0, 255).byte()
