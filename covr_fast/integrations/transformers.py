"""Weighted fine-tuning with the Hugging Face `Trainer` and TRL's `SFTTrainer`: a weight per sample or token.

See docs/finetuning.md.
"""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Trainer

from ._transformers_collator import WEIGHT, WeightedCollator
from ._transformers_head import IGNORE, LossAtHead, plain_head
from ._transformers_packing import pack
from ._transformers_returns import RETURN, weigh_by_return, weights_of_returns

__all__ = ["return_weighted_loss", "weigh_by_return", "weights_of_returns"]

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)

_TEXT = {"input_ids", "attention_mask", "position_ids", "token_type_ids", "labels"}


def return_weighted_loss(trainer_class: type[AnyTrainer]) -> type[AnyTrainer]:
    """The same trainer with the loss `1 / N_v * sum_bt w_bt * -log p(y_bt)`; `w` is the column "weight".

        trainer = return_weighted_loss(Trainer)(model, args, train_dataset=dataset, ...)

    RALW (Xia et al. 2026, Eq. 6). N_v counts the label tokens of the whole accumulated batch, over all
    devices, also those of weight 0. Label smoothing is the trainer's own argument. The full logits are never
    made: the loss takes hidden states and the head's weight. Samples of weight 0 get no forward where the
    model's inputs are text and padded.

    The training data needs a column "weight": floats that are not negative, one per sample or a list of one
    per token, in line with `input_ids`. Evaluation data may have it; without it all its weights are 1.

    Args:
        trainer_class: transformers.Trainer, trl.SFTTrainer or another subclass. Its `compute_loss` is
            replaced, so what else it does there (TRL's entropy and token accuracy) is not logged.

    Raises:
        TypeError: `trainer_class` is no such class.
        ValueError: by the new class, about data, arguments and models that it does not support.
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise TypeError(
            f"trainer_class must be transformers.Trainer or a subclass of it, not {trainer_class!r}: "
            "return_weighted_loss(Trainer)(model, args, ...)"
        )
    return type(f"ReturnWeighted{trainer_class.__name__}", (_ReturnWeighted, trainer_class), {})


class _ReturnWeighted(Trainer):
    """What `return_weighted_loss` puts before a trainer's class."""

    model: Any
    _signature_columns: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_settings()
        self._check_columns()
        plain_head(self.model)
        self._keep_logits = False
        self.compute_loss_func = self._weighted_loss
        self.data_collator = WeightedCollator(self.data_collator)

    def _check_settings(self) -> None:
        args = self.args
        refused = [
            (self.compute_loss_func is not None, "compute_loss_func: the loss is return_weighted_loss"),
            (getattr(args, "loss_type", "nll") != "nll", 'loss_type must be "nll"'),
            (args.use_liger_kernel, "use_liger_kernel replaces the forward of the model"),
            (args.torch_compile, "torch_compile is not supported"),
            (args.n_gpu > 1, "several GPUs in one process: start with torchrun, or make one GPU visible"),
            (self.model.config.is_encoder_decoder, "model: encoder-decoder models are not supported"),
        ]
        for found, reason in refused:
            if found:
                raise ValueError(reason)

    def _check_columns(self) -> None:
        columns = getattr(self.train_dataset, "column_names", None)
        if columns is not None and WEIGHT not in columns:
            fix = "call weigh_by_return(dataset) first" if RETURN in columns else "add one"
            raise ValueError(f'train_dataset has no column "weight": {fix} (its columns are {columns})')

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any
    ) -> Any:
        """TRL's preparation, with the weights packed where the tokens are."""
        prepare = super()._prepare_dataset  # type: ignore[misc]
        if not packing:
            return prepare(dataset, processing_class, args, packing, *rest)
        uncut = copy.copy(args)
        uncut.max_length = None
        dataset = prepare(dataset, processing_class, uncut, False, *rest)
        return pack(dataset, args.max_length, args.packing_strategy)

    def _set_signature_columns_if_needed(self) -> None:
        """Keeps the column "weight" when the trainer removes what the model's forward does not take."""
        super()._set_signature_columns_if_needed()
        if WEIGHT not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, WEIGHT]

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """As the trainer's own; only where its caller asks for logits (`compute_metrics`) they are made."""
        self._keep_logits = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._keep_logits = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted loss, through the base class, which scales it for several devices. The `logits` of the
        outputs are the loss, except where `prediction_step` asks for logits."""
        inputs = dict(inputs)
        labels, weights = inputs["labels"], inputs.pop(WEIGHT, None)
        if "shift_labels" in inputs:
            raise ValueError("parallelism_config: sequences that are split over devices are not supported")
        if weights is None:
            if model.training:
                raise ValueError('train_dataset: a batch has no "weight"; give every example one')
            weights = torch.ones(len(labels), device=labels.device)
        # In evaluation the trainer gives none, and the base class may not get ours: it multiplies a loss that
        # was divided by the labels of all devices by their number.
        valid = (labels[:, 1:] != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
        if not self._keep_logits:
            inputs, weights = _without_weightless(inputs, weights)
        self._at_head = LossAtHead(
            plain_head(self.model),
            inputs["labels"],
            weights,
            label_smoothing=self.args.label_smoothing_factor,
            valid=valid,
            keep_logits=self._keep_logits,
        )
        with self._at_head:
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def _weighted_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        if getattr(outputs, "aux_loss", None) is not None:
            raise ValueError(
                "model: its config asks for the router's loss, which this loss does not add; set "
                "output_router_logits=False (TRL: router_aux_loss_coef=0.0)"
            )
        return self._at_head.loss(getattr(outputs, "logits", None))


def _without_weightless(inputs: dict[str, Any], weights: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Only the rows in which a weighted label is predicted; the first one if there is none, so that every
    trained weight gets a gradient (of zero). All of them where an input has not one row per sample."""
    labels = inputs["labels"]
    if not inputs.keys() <= _TEXT or any(len(value) != len(labels) for value in inputs.values()):
        return inputs, weights
    spread = weights if weights.ndim == 2 else weights[:, None]
    rows = ((labels != IGNORE) & (spread > 0))[:, 1:].any(1).nonzero()[:, 0]
    if len(rows) == len(labels):
        return inputs, weights
    if len(rows) == 0:
        rows = rows.new_zeros(1)
    return {name: value[rows] for name, value in inputs.items()}, weights[rows]
