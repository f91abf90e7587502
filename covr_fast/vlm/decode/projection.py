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
        self._bias: Tensor | None = None
        if any(part.bias is not None for part in parts):
            zeros = self._weight.new_zeros(len(self._weight))
            biases = zip(parts, zeros.split([len(part.weight) for part in parts]), strict=True)
            self._bias = torch.cat([zero if part.bias is None else part.bias for part, zero in biases])

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)

    def add_to(self, x: Tensor, y: Tensor) -> None:
        x.view(-1, x.shape[-1]).addmm_(y.reshape(-1, y.shape[-1]), self._weight.t())
        if self._bias is not None:
            x += self._bias


class BesideLora(Projection):
    """One product per layer, to which its LoRA is added; the first factors of all are one product.

    The LoRA's part is there first, and the layer's product is added to it: `addmm` adds up in float32 and
    rounds once. The other way round, a part smaller than half a unit in the last place of the layer's product
    would be rounded away.
    """

    def __init__(self, parts: list[LinearParts]) -> None:
        self._parts = parts
        downs = [part.down for part in parts if part.down is not None]
        self._down = torch.cat(downs) if downs else None
        self._ranks = [0 if part.down is None else len(part.down) for part in parts]

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows.new_empty(len(rows), 0) if self._down is None else rows @ self._down.t()
        lows = low.split(self._ranks, 1)
        outputs = [_product(part, low, rows) for part, low in zip(self._parts, lows, strict=True)]
        out = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
        return out.view(*x.shape[:-1], -1)


def _product(part: LinearParts, low: Tensor, x: Tensor) -> Tensor:
    """[M, N] of inputs `x` [M, K], and `low` [M, R], which are x down'."""
    if part.up is None:
        return F.linear(x, part.weight, part.bias)
    out = torch.addmm(low @ part.up.t(), x, part.weight.t())
    return out if part.bias is None else out.add_(part.bias)


class Called(Projection):
    """Modules that can only be called."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = modules

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in self._modules], -1)
