"""The column `weight` on its way through a data collator."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

WEIGHT = "weight"

Example = Mapping[str, Any]


class WeightedCollator:
    """What `collate` makes of the examples, and their weights under "weight".

    They are float32 [B] if every example has one number; else float32 [B, T] like the labels, 0 on padding.
    A batch without padding, all examples in one row, has them one after the other. The label of the first
    token of a row becomes -100, because no token predicts it: so it counts in no N_v.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], Any]) -> None:
        self.collate = collate

    def __call__(self, examples: Sequence[Example]) -> Any:
        """
        Args:
            examples: all with a "weight", or none: a number, or one for each of the example's tokens.

        Raises:
            ValueError: weights that are negative, not finite, missing in some examples, or do not fit.
        """
        batch = self.collate([{k: v for k, v in example.items() if k != WEIGHT} for example in examples])
        if batch.get("labels") is None:
            raise ValueError("labels: the data collator gives none; use one that does")
        batch["labels"] = batch["labels"].clone()  # which may be `input_ids` itself
        batch["labels"][:, 0] = -100
        given = [example.get(WEIGHT) for example in examples]
        if all(weight is None for weight in given):
            return batch
        if any(weight is None for weight in given):
            raise ValueError("weight is missing in some examples of a batch: give every example one")
        weights = [torch.as_tensor(weight, dtype=torch.float32) for weight in given]
        for weight in weights:
            if not (weight.isfinite() & (weight >= 0)).all():
                raise ValueError(f"weight must be finite and not negative, not {weight.tolist()}")
        batch[WEIGHT] = _arrange(weights, examples, batch)
        return batch


def _arrange(weights: list[Tensor], examples: Sequence[Example], batch: Mapping[str, Any]) -> Tensor:
    """[B] or [B, T] of weights that are scalars or [tokens of the example]."""
    labels, mask = batch["labels"], batch.get("attention_mask")
    padded = len(labels) == len(examples)
    if padded and all(weight.ndim == 0 for weight in weights):
        return torch.stack(weights)
    arranged = torch.zeros(labels.shape)
    if mask is None and len(labels) == 1:
        lengths = [len(example["input_ids"]) for example in examples]
        row = torch.cat([spread(*pair) for pair in zip(weights, lengths, strict=True)])
        arranged[0, : len(row)] = row
    elif padded:
        tokens = torch.ones_like(labels).bool() if mask is None else mask.bool()
        for row, kept, weight in zip(arranged, tokens, weights, strict=True):
            row[kept] = spread(weight, int(kept.sum()))
    else:
        raise ValueError(f"weight: the data collator made {len(labels)} rows of {len(examples)} examples")
    return arranged


def spread(weight: Tensor, tokens: int) -> Tensor:
    """[tokens] of a scalar or [tokens]."""
    if weight.ndim > 0 and weight.shape != (tokens,):
        raise ValueError(
            f"weight has the shape {list(weight.shape)} in an example of {tokens} tokens: give one number, "
            "or one for each token (a trainer that cuts examples to max_length does not cut their weights)"
        )
    return weight.expand(tokens)
