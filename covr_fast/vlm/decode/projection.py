"""Linear layers of the same input: as one product, with LoRA beside the weights, or called one by one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.adapters import LinearParts, bare, linear_beside_lora, merged_linear


def projection(*modules: nn.Module, beside: bool = False) -> "Projection":
    """The fastest form of linear layers of the same input. Their outputs are put one after the other.

    Args:
        beside: keep LoRA beside the weights, which are not copied, instead of merging it into a joined copy.
    """
    own = [bare(module) for module in modules]
    found = [linear_beside_lora(module) if beside else merged_linear(module) for module in own]
    parts = [part for part in found if part is not None]
    if len(parts) < len(own):
        return Called(own)
    return BesideLora(parts) if beside else Joined(parts)


class Projection:
    """See `projection`."""

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        raise NotImplementedError

    def add_to(self, x: Tensor, y: Tensor) -> None:
        """Adds the product of `y` [..., K] to a contiguous `x` [..., N] in place."""
        x += self(y)


class Joined(Projection):
    """One product."""

    def __init__(self, parts: list[LinearParts]) -> None:
        self._weight = torch.cat([part.weight for part in parts])
        self._bias = _joined_bias(parts)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)

    def add_to(self, x: Tensor, y: Tensor) -> None:
        x.view(-1, x.shape[-1]).addmm_(y.reshape(-1, y.shape[-1]), self._weight.t())
        if self._bias is not None:
            x += self._bias


class BesideLora(Projection):
    """One product per layer, which is added to that of its LoRA; the first factors of all are one product.

    LoRA's product is there first, and `addmm_` adds the layer's to it in float32 and rounds once. The other
    way round, what is smaller than half a unit in the last place of the layer's product would be lost.
    """

    def __init__(self, parts: list[LinearParts]) -> None:
        self._parts = parts
        self._bias = _joined_bias(parts)
        downs = [part.down for part in parts if part.down is not None]
        self._down = torch.cat(downs) if downs else None
        self._ranks = [0 if part.down is None else len(part.down) for part in parts]
        self._sizes = [len(part.weight) for part in parts]

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = rows.new_empty(len(rows), sum(self._sizes))
        low = rows.new_empty(len(rows), 0) if self._down is None else rows @ self._down.t()
        outs, lows = out.split(self._sizes, 1), low.split(self._ranks, 1)
        for part, own, its_low in zip(self._parts, outs, lows, strict=True):
            if part.up is None:
                torch.mm(rows, part.weight.t(), out=own)
            else:
                torch.mm(its_low, part.up.t(), out=own).addmm_(rows, part.weight.t())
        if self._bias is not None:
            out += self._bias
        return out.view(*x.shape[:-1], -1)


def _joined_bias(parts: list[LinearParts]) -> Tensor | None:
    """[N] of all parts, zero where one has none; None if none has one."""
    if all(part.bias is None for part in parts):
        return None
    zeros = [part.weight.new_zeros(len(part.weight)) for part in parts]
    return torch.cat([z if part.bias is None else part.bias for part, z in zip(parts, zeros, strict=True)])


class Called(Projection):
    """Modules that can only be called."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = modules

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in self._modules], -1)
