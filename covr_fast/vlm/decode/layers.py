"""The parts of a transformer layer as they serve: LoRA merged, projections of one input joined, no autograd.

For float32 on the CPU norms and products run in C++ (`csrc/transformer.cpp`, `csrc/product.cpp`), and where
it can a whole layer does (`cpp_layers.py`). Everywhere else the same formulas run as torch operations.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covr_fast import _C
from covr_fast.border import address
from covr_fast.ops._backend import launch

from ..model.adapters import bare, linear_weights, untouched


def in_cpp(like: Tensor) -> bool:
    """Whether layers with weights like this one run in C++."""
    return like.device.type == "cpu" and like.dtype == torch.float32


class LayerModules(NamedTuple):
    """What a layer is made of: x += out(attention(qkv(input_norm(x)))), then x += mlp(mlp_norm(x))."""

    input_norm: Any
    """A module with `weight` and `variance_epsilon`, as all norms here."""
    qkv: tuple[nn.Module, ...]
    """Linear layers whose outputs, one behind the other, are queries, keys and values."""
    out: nn.Module
    """The linear layer behind the attention."""
    mlp_norm: Any
    mlp: Any
    """See `GatedMlp`."""
    head_norms: tuple[Any, Any] | None = None
    """Of the heads of queries and of keys, where there are such (Qwen3)."""


class Norm:
    """The RMS norm of a module with `weight` and `variance_epsilon`; an adapted one is called."""

    def __init__(self, module: Any) -> None:
        self.cpp: Any = None
        """For the C++ that this norm is part of; good as long as this object is."""
        module = bare(module)
        self._module = None if untouched(module) else module
        if self._module is not None:
            return
        self._weight = module.weight.detach().contiguous()
        self._epsilon: float = module.variance_epsilon
        if in_cpp(self._weight):
            self.cpp = _C.Norm(address(self._weight, torch.float32), self._epsilon)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if self._module is not None:
            return self._module(x)
        if self.cpp is None:
            return F.rms_norm(x, self._weight.shape, self._weight, self._epsilon)
        x = x.contiguous()
        out = torch.empty_like(x)
        width = x.shape[-1]
        tensors = (out, torch.float32), (x, torch.float32)
        launch("rms_norm", *tensors, self.cpp, x.numel() // width, width, torch.get_num_threads())
        return out


class Projection:
    """Linear layers of the same input as one product; where one of them is not plain, each is called."""

    PANEL = 32  # of Packed in csrc/product.h

    def __init__(self, *modules: nn.Module) -> None:
        self._modules = [bare(module) for module in modules]
        self.cpp: Any = None
        """For the C++ that this product is part of; good as long as this object is."""
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        parts = [linear_weights(module) for module in self._modules]
        if any(part is None for part in parts):
            return
        weights, biases = zip(*[part for part in parts if part is not None], strict=True)
        self._weight = torch.cat(weights)
        if any(bias is not None for bias in biases):
            pairs = zip(weights, biases, strict=True)
            self._bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in pairs])
        if in_cpp(self._weight):
            self._pack(self._weight)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        if self.cpp is not None:
            out = x.new_empty(*x.shape[:-1], self.outputs)
            self._launch(out, x, add=False)
            return out
        if self._weight is None:
            return torch.cat([module(x) for module in self._modules], -1)
        return F.linear(x, self._weight, self._bias)

    def add_to(self, x: Tensor, y: Tensor) -> None:
        """Adds the product of `y` [..., K] to a contiguous `x` [..., N] in place."""
        if self.cpp is not None:
            self._launch(x, y, add=True)
            return
        if self._weight is None:
            x += self(y)
            return
        x.view(-1, x.shape[-1]).addmm_(y.reshape(-1, y.shape[-1]), self._weight.t())
        if self._bias is not None:
            x += self._bias

    def _pack(self, weight: Tensor) -> None:
        """Keeps the weights in panels of PANEL outputs [panels, K, PANEL] instead, zeros behind the last."""
        self.outputs, inputs = weight.shape
        missing = -self.outputs % self.PANEL
        bias = weight.new_zeros(self.outputs) if self._bias is None else self._bias
        self._bias = F.pad(bias, (0, missing))
        padded = F.pad(weight, (0, 0, 0, missing))
        self._weight = padded.view(-1, self.PANEL, inputs).transpose(1, 2).contiguous()
        addresses = (address(tensor, torch.float32) for tensor in (self._weight, self._bias))
        self.cpp = _C.Packed(*addresses, inputs, self.outputs)

    def _launch(self, out: Tensor, x: Tensor, *, add: bool) -> None:
        x = x.contiguous()
        rows = x.numel() // x.shape[-1]
        tensors = (out, torch.float32), (x, torch.float32)
        launch("product", *tensors, rows, self.cpp, add, torch.get_num_threads())


class GatedMlp:
    """`down(activation(gate(x)) * up(x))` of a module with these parts."""

    def __init__(self, module: Any) -> None:
        self.gate_up = Projection(module.gate_proj, module.up_proj)
        self.down = Projection(module.down_proj)
        self._activation = module.act_fn

    @property
    def silu(self) -> bool:
        return isinstance(self._activation, nn.SiLU) or type(self._activation).__name__ == "SiLUActivation"

    def add_to(self, x: Tensor, y: Tensor) -> None:
        """Adds what it makes of `y` to a contiguous `x` in place, both [..., D]."""
        gate, up = self.gate_up(y).chunk(2, -1)
        self.down.add_to(x, self._activation(gate) * up)
