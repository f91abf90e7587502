"""From a column of returns to a column of weights: EDDF and RALW over a whole dataset."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ._transformers_collator import WEIGHT

if TYPE_CHECKING:
    from datasets import Dataset

RETURN = "return"


def weights_of_returns(returns: Sequence[float] | Tensor, *, entropy: float = 0.0) -> list[float]:
    """EDDF and RALW (Xia et al. 2026, Eq. 5 and 6) over all samples at once.

    Args:
        returns: how good each of the N samples is; any finite numbers, larger is better.
        entropy: of the policy that made the samples, in nats. The filter keeps returns above
            `median + sigmoid(-entropy) * IQR`: of bell-shaped returns the best quarter at 0, up to the best
            half at a high entropy, down to the best eleventh at a low (negative) one.

    Returns:
        N weights in [0, 1]. Of the samples that the filter keeps, those in the upper half of the range of
        returns have more than 0. The others have 0.

    Raises:
        ValueError: returns are empty or not finite, or the filter keeps none of them.
    """
    values = torch.as_tensor(returns, dtype=torch.float64).cpu()
    kept = ops.exploration_filter(values, entropy).indices
    if len(kept) == 0:
        raise ValueError(
            f"returns: none of the {len(values)} is above the filter's threshold; with so few different "
            "returns, choose the weights yourself"
        )
    weights = torch.zeros_like(values)
    weights[kept] = ops.return_weights(values[kept])
    return weights.tolist()


def weigh_by_return(dataset: "Dataset", *, entropy: float = 0.0) -> "Dataset":
    """The dataset with a column "weight" in place of "return", by `weights_of_returns`.

    Args:
        dataset: a datasets.Dataset with a column "return" of one number per sample.
        entropy: see `weights_of_returns`.

    Raises:
        TypeError: a dataset of another type, for example a stream, which cannot be looked at as a whole.
        ValueError: it has no column "return" or already a "weight", or as `weights_of_returns`.
    """
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise TypeError(f"dataset must be a datasets.Dataset, not {type(dataset).__name__}")
    if RETURN not in dataset.column_names or WEIGHT in dataset.column_names:
        raise ValueError(f'dataset must have a column "return" and no "weight", not {dataset.column_names}')
    weights = weights_of_returns(dataset[RETURN][:], entropy=entropy)
    return dataset.remove_columns(RETURN).add_column(WEIGHT, weights)
