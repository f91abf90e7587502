"""The held-out loss: how likely the answers are to the model in the form in which it is served."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..decode.decoder import Layout
from ..decode.transformer import Transformer
from ..model.backbones import Backbone
from .objective import IGNORE, RoundImages, Samples


@torch.no_grad()
def served_nll(
    backbone: Backbone,
    layout: Layout,
    samples: Samples,
    rows: Tensor,
    images: RoundImages,
    micro_batch: int,
) -> float:
    """Mean of -log p over the answer tokens of `rows` int64[M], in nats per token; NaN without rows.

    It is computed by the transformer that answers (`decode.transformer`), with the weights that it would get
    if they were published now, and over the whole vocabulary. Unlike Eq. 6 it weights all samples alike:
    return weights depend on a few outliers, and most of them are 0.
    """
    if len(rows) == 0:
        return float("nan")
    transformer = Transformer(backbone)
    attention = transformer.attention(layout.positions)
    prefix = transformer.new_cache(1, len(layout.prefix))
    if len(layout.prefix):
        transformer(backbone.embed(layout.prefix)[None], attention, prefix)
    total = torch.zeros((), dtype=torch.float32, device=backbone.device)
    for part in rows.split(micro_batch):
        answers = samples.answers[part].to(total.device)
        tokens = torch.cat((layout.body.expand(len(part), -1), answers[:, :-1]), 1)
        hidden = transformer(
            backbone.embed(tokens),
            attention,
            transformer.new_cache(len(part), len(layout.prefix) + tokens.shape[1], prefix),
            image_at=layout.image_at,
            image=images(part),
            outputs=answers.shape[1],
        )
        logits = backbone.head(hidden).float()
        labels = samples.labels[part].to(total.device)
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return float(total) / samples.valid_tokens(rows)
