"""The parts of a transformer layer as they serve: LoRA merged, projections of one input joined, no autograd.

On the CPU in float32 what lies between the matrix products runs in C++ (`csrc/transformer.cpp`): at the sizes
that a CPU answers with in time, torch's operations cost more than the arithmetic. Everywhere else the same
formulas run as torch operations.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covr_fast.ops._backend import launch


def in_cpp(like: Tensor) -> bool:
    """Whether layers with weights like this one run in C++."""
    return like.device.type == "cpu" and like.dtype == torch.float32


class Norm:
    """The RMS norm of a module with `weight` and `variance_epsilon`."""

    def __init__(self, module: Any) -> None:
        self._weight = module.weight.detach()
        self._epsilon: float = module.variance_epsilon
        self._cpp = in_cpp(self._weight)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if not self._cpp:
            return F.rms_norm(x, self._weight.shape, self._weight, self._epsilon)
        x = x.contiguous()
        out = torch.empty_like(x)
        width = x.shape[-1]
        rows = x.numel() // width
        launch("rms_norm", out, x, self._weight, rows, width, self._epsilon, torch.get_num_threads())
        return out


class Projection:
    """Linear layers of the same input as one product; quantized ones are called one by one."""

    def __init__(self, *modules: nn.Module) -> None:
        self._modules = modules
        parts = [_plain(module) for module in modules]
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        if any(part is None for part in parts):
            return
        weights, biases = zip(*[part for part in parts if part is not None], strict=True)
        weight = torch.cat(weights)
        # For the few rows of a decode step, the CPU's product is a third faster from weights in columns.
        self._weight = weight.t().contiguous().t() if in_cpp(weight) else weight
        if biases[0] is not None:
            self._bias = torch.cat(biases)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        if self._weight is None:
            return torch.cat([module(x) for module in self._modules], -1)
        return F.linear(x, self._weight, self._bias)

    def add_to(self, x: Tensor, y: Tensor) -> None:
        """Adds the product of `y` [..., K] to a contiguous `x` [..., N] in place."""
        if self._weight is None:
            x += self(y)
            return
        x.view(-1, x.shape[-1]).addmm_(y.reshape(-1, y.shape[-1]), self._weight.t())
        if self._bias is not None:
            x += self._bias


class GatedMlp:
    """`down(activation(gate(x)) * up(x))` of a module with these parts."""

    def __init__(self, module: Any) -> None:
        self._gate_up = Projection(module.gate_proj, module.up_proj)
        self._down = Projection(module.down_proj)
        self._activation = module.act_fn
        self._silu = _is_silu(module.act_fn)

    def add_to(self, x: Tensor, y: Tensor) -> None:
        """Adds what it makes of `y` to a contiguous `x` in place, both [..., D]."""
        gate_up = self._gate_up(y)
        if self._silu and in_cpp(gate_up):
            width = gate_up.shape[-1] // 2
            gated = gate_up.new_empty(*gate_up.shape[:-1], width)
            launch("silu_gate", gated, gate_up, gated.numel() // width, width, torch.get_num_threads())
        else:
            gate, up = gate_up.chunk(2, -1)
            gated = self._activation(gate) * up
        self._down.add_to(x, gated)


def _is_silu(activation: Any) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


def _plain(module: Any) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear layer, LoRA merged in; None if its weight is not a plain matrix."""
    adapted = hasattr(module, "get_delta_weight")
    base = module.get_base_layer() if adapted else module
    if type(base) is not nn.Linear:
        return None
    weight = base.weight
    if adapted:
        for adapter in module.active_adapters:
            weight = weight + module.get_delta_weight(adapter).to(weight.dtype)
    return weight.detach(), None if base.bias is None else base.bias.detach()
