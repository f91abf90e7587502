"""Float32 master copies of half-precision weights (Micikevicius et al. 2018, "Mixed Precision Training")."""

from torch import Tensor

from .lora import assign


class Masters:
    """The values that an optimizer changes for `weights`: themselves in float32, else float32 copies.

    In bfloat16 a step smaller than 1/512 of a weight is lost, so small steps would never add up. The model
    computes with the rounded values: those that are served.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        self.values = [w if _is_exact(w) else w.detach().float().requires_grad_() for w in weights]
        self._rounded = [(w, m) for w, m in zip(weights, self.values, strict=True) if w is not m]

    def collect_gradients(self) -> None:
        """Adds the gradients of the rounded weights to those of their masters. Call it after a backward, so
        that gradients are added up in float32."""
        for weight, master in self._rounded:
            if weight.grad is not None:
                gradient, weight.grad = weight.grad, None
                if master.grad is None:
                    master.grad = gradient.float()
                else:
                    master.grad += gradient

    def round(self) -> None:
        """Writes the rounded masters into the weights. Call it after a step."""
        if self._rounded:
            weights, masters = (list(part) for part in zip(*self._rounded, strict=True))
            assign(weights, masters)


def _is_exact(weight: Tensor) -> bool:
    return weight.dtype.itemsize >= 4
