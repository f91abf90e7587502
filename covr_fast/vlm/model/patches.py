"""Frames to the patches of the Qwen-VL family, as a batch on the frames' device.

As in `pixels`, but a patch lies beside the others of its image token.
"""

from typing import Any

from torch import Tensor

from .pixels import Normalizer
from .resample import FILTERS, resize


class PatchPixels:
    """The same as transformers' `Qwen2VLImageProcessor` with its settings, for frames of one size."""

    def __init__(self, image_processor: Any) -> None:
        p = image_processor
        if not p.do_resize or p.resample not in FILTERS:
            raise ValueError(
                f"{type(p).__name__} with do_resize={p.do_resize} and resample={p.resample} is not supported"
            )
        self._processor = p
        self.patch = p.patch_size
        self.merge = p.merge_size
        self.frames = p.temporal_patch_size
        self._normalize = Normalizer(p)

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
        images = resize(images, [size], int(self._processor.resample))
        m, p = self.merge, self.patch
        rows, columns = size[0] // p, size[1] // p
        blocks = images.reshape(batch, channels, rows // m, m, p, columns // m, m, p)
        # Patches of one merged token lie together: [B, rows/m, columns/m, m, m, C, p, p]. Reordered as bytes,
        # before they become floats of four times the size.
        blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, channels, p, p)
        # A still image is repeated to fill the temporal patch.
        pixels = self._normalize(blocks)[:, :, None].expand(-1, -1, self.frames, -1, -1)
        return pixels.reshape(len(blocks), -1)
