"""From pixels to a latent: convolutions, and the linear layer with LayerNorm on top of them."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError

# Explicit, because other libraries change torch's defaults while they load.
MADE: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def orthogonal_(module: nn.Module, gain: float) -> None:
    """Orthogonal weights and no bias for a linear layer or a convolution; for `Module.apply`."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.orthogonal_(module.weight, gain)
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def delta_orthogonal_(module: nn.Module, gain: float) -> None:
    """A convolution's weights are orthogonal at its kernel's centre and 0 elsewhere (Xiao et al. 2018);
    for `Module.apply`."""
    if isinstance(module, nn.Conv2d):
        middle = module.kernel_size[0] // 2
        nn.init.zeros_(module.weight)
        nn.init.orthogonal_(module.weight.data[:, :, middle, middle], gain)
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]


class Convolutions(nn.Module):
    """Pixels [B, C, H, W] in [0, 1], of any floating dtype -> features [B, F] in `dtype`, ReLU after every
    convolution. The weights are float32 whatever `dtype` is.

    Args:
        obs_shape: (C, H, W).
        channels, strides: of the convolutions, without padding.
        first: kernel size of the first one; the others are 3x3.
        init: of the weights, with the gain of ReLU.
        dtype: what they compute in.
        offset: added to the pixels.

    Raises:
        UserError: the frames are too small.
    """

    def __init__(
        self,
        obs_shape: tuple[int, ...],
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        *,
        first: int = 3,
        init: Literal["orthogonal", "delta"] = "orthogonal",
        dtype: torch.dtype = torch.float32,
        offset: float = 0.0,
    ):
        super().__init__()
        self.dtype, self.offset = dtype, offset
        layers: list[nn.Module] = []
        inputs = obs_shape[0]
        for i, (width, stride) in enumerate(zip(channels, strides, strict=True)):
            layers += [nn.Conv2d(inputs, width, first if i == 0 else 3, stride, **MADE), nn.ReLU()]
            inputs = width
        self.layers = nn.Sequential(*layers)
        make = orthogonal_ if init == "orthogonal" else delta_orthogonal_
        self.layers.apply(lambda module: make(module, math.sqrt(2)))
        try:
            with torch.no_grad():
                shape = self.layers(torch.zeros(1, *obs_shape, **MADE)).shape
        except RuntimeError as error:
            raise UserError(
                f"frames of {obs_shape[1]}x{obs_shape[2]} are too small for agent.strides={strides}: "
                "use larger frames or fewer convolutions"
            ) from error
        self.map_shape: tuple[int, ...] = tuple(shape[1:])
        """(channels, height, width) of the last feature maps."""
        self.features = math.prod(self.map_shape)
        """F."""
        # For these shapes two to five times as fast as channels first on a CPU. Tensor cores need it too.
        self.layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.dtype, memory_format=torch.channels_last)
        if self.offset:
            pixels = pixels + self.offset
        with torch.autocast(pixels.device.type, self.dtype, enabled=self.dtype == torch.bfloat16):
            maps: Tensor = self.layers(pixels)
        return maps.flatten(1)


class Projection(nn.Module):
    """Features [B, F] -> latent float32[B, latent]: a linear layer, LayerNorm, and tanh if `squash`."""

    def __init__(self, features: int, latent: int, *, squash: bool):
        super().__init__()
        self.linear = nn.Linear(features, latent, **MADE)
        orthogonal_(self.linear, 1.0)
        self.norm = nn.LayerNorm(latent, **MADE)
        self.squash = squash

    def forward(self, features: Tensor) -> Tensor:
        latent: Tensor = self.norm(self.linear(features.to(self.linear.weight.dtype)))
        return torch.tanh(latent) if self.squash else latent
