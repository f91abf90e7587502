"""The loss at the output head: where a model would make logits, it makes the loss."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops

IGNORE = -100


def plain_head(model: nn.Module) -> nn.Linear:
    """The module that makes the logits of a model of transformers or peft.

    Raises:
        ValueError: it is not a product with a matrix and nothing else.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if hasattr(head, "modules_to_save"):  # peft trains a copy of the whole head
        adapters = head.active_adapters
        head = head.modules_to_save[adapters[0]] if adapters else head.original_module
    if type(head) is not nn.Linear:
        raise ValueError(
            f"model: its output head is {type(head).__name__}; the loss without logits needs a "
            "torch.nn.Linear (leave the head out of target_modules of an adapter and out of quantization)"
        )
    if head.bias is not None:
        raise ValueError("model: its output head has a bias, which the loss without logits does not support")
    if "forward" in vars(head):
        raise ValueError(
            "model: the forward of its output head was replaced (by hooks of a device_map over several "
            "devices?); load the model on one device"
        )
    return head


class LossAtHead:
    """Within its `with` block, the head gives the loss of Eq. 6 (Xia et al. 2026) in place of logits.

    So the loss is computed inside the model's forward, where the head's weight is whole and in the dtype of
    autocast, whatever wraps the model.

    Args:
        head: of the model whose forward runs once in the block.
        labels: int64 [B, T], aligned with the model's input: hidden state t predicts label t + 1.
        weights: float [B] or [B, T] like the labels.
        valid: N_v, a count; None counts the labels that are predicted.
        keep_logits: the head gives its logits, and the loss beside them.
    """

    def __init__(
        self,
        head: nn.Linear,
        labels: Tensor,
        weights: Tensor,
        *,
        label_smoothing: float,
        valid: Tensor | int | None,
        keep_logits: bool,
    ) -> None:
        self._head = head
        self._labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        self._weights = weights if weights.ndim == 1 else F.pad(weights[:, 1:], (0, 1))
        self._label_smoothing = label_smoothing
        self._valid = valid
        self._keep_logits = keep_logits
        self._loss: Tensor | None = None
        self._given: Tensor | None = None

    def __enter__(self) -> "LossAtHead":
        self._head.forward = self._forward  # type: ignore[method-assign,assignment]
        return self

    def __exit__(self, *_: object) -> None:
        del self._head.forward

    def _forward(self, hidden: Tensor) -> Tensor:
        if self._given is not None:
            raise ValueError("model: it calls its output head twice in one forward, so this is not the loss")
        if hidden.shape[:2] != self._labels.shape:
            raise ValueError(
                f"labels are {list(self._labels.shape)}, but the model gives {list(hidden.shape[:2])} hidden "
                "states: prompt tuning and logits_to_keep are not supported"
            )
        weight = self._head.weight
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        loss = ops.return_weighted_linear_cross_entropy(
            hidden, weight, self._labels, self._weights, label_smoothing=self._label_smoothing
        )
        if self._valid is not None:  # the operation divides by the labels of this micro-batch
            labels = (self._labels != IGNORE).sum()
            loss = loss * (labels / torch.as_tensor(self._valid, device=labels.device).clamp(min=1))
        self._loss = loss
        self._given = F.linear(hidden, weight) if self._keep_logits else loss
        return self._given

    def loss(self, logits: Tensor | None) -> Tensor:
        """The scalar, given what the model returned as logits.

        Raises:
            ValueError: the model has changed it, so its logits are more than the head's product.
        """
        if self._loss is None or self._given is None:
            raise ValueError("model: it did not call its output head, so there is no loss")
        if logits is None or not _same(logits, self._given):
            raise ValueError(
                "model: it scales, caps or cuts its logits after the output head, which the loss without "
                "logits does not support"
            )
        return self._loss if self._keep_logits else logits


def _same(logits: Tensor, given: Tensor) -> bool:
    """Whether they are one tensor, or a wrapper of the model has made a copy."""
    return logits is given or torch.equal(logits.to(given.dtype), given)
