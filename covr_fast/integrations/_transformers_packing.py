"""TRL's packing, with the column `weight`, which TRL's own preparation drops."""

from typing import Any

import torch

from ._transformers_collator import WEIGHT, spread


def pack(dataset: Any, max_length: int | None, strategy: str) -> Any:
    """Tokens, labels and weights of a prepared dataset, packed into rows of at most `max_length` tokens."""
    from trl.data_utils import pack_dataset

    if max_length is None:
        raise ValueError("packing needs a max_length")
    columns = ["input_ids", "labels"]
    if WEIGHT in next(iter(dataset)):
        columns.append(WEIGHT)
        dataset = dataset.map(_per_token)
    return pack_dataset(dataset.select_columns(columns), max_length, strategy)


def _per_token(row: dict[str, Any]) -> dict[str, list[float]]:
    weight = torch.as_tensor(row[WEIGHT], dtype=torch.float32)
    return {WEIGHT: spread(weight, len(row["input_ids"])).tolist()}
