"""The decode of a batch as one CUDA graph."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...cuda_graph import Captured, CudaGraphs, Tensors
from ..model.backbones import ImageFeatures
from .decoder import Decoder
from .transformer import KeyValueCache


class GraphedDecoder:
    """A `Decoder` whose calls are replayed as CUDA graphs; arguments and answers are the decoder's.

    A batch is padded to the next power of two with rows of ones, whose answers are dropped. So batch sizes up
    to B = 2^k need k + 1 graphs (as many again for sampled answers, and for answers with a confidence), and
    the caches of all graphs have fewer than 2 B rows. The third call of a size records its graph.

    Inside the graph: everything from image features to actions, answer tokens and confidences. Outside: the
    vision tower, the noise, the padding, and the copies of inputs into the graph and of answers out of it.

    What waits for what: each call is a turn of `graphs`, on the caller's current stream. The graphs refer to
    the served weights, so both are dropped together when weights are published.
    """

    def __init__(self, decoder: Decoder, graphs: CudaGraphs) -> None:
        self.decoder = decoder
        self._graphs = graphs
        self._caches: dict[int, KeyValueCache] = {}
        self._captured: dict[tuple[int, bool, bool], Captured] = {}

    @torch.no_grad()
    def __call__(
        self, image: ImageFeatures, temperature: float, noise: Tensor | None, *, confidence: bool = False
    ) -> tuple[Tensor, ...]:
        batch = len(image.tokens)
        rows = 1 << (batch - 1).bit_length()
        inputs = {"tokens": image.tokens, **{f"deep{i}": x for i, x in enumerate(image.deep)}}
        if noise is not None:
            # A tensor, because the graph would repeat the number that it was recorded with.
            inputs |= {"noise": noise, "temperature": noise.new_full((batch, 1), temperature)}
        captured = self._graph(rows, noise is not None, confidence)
        answers = captured({name: _padded(x, rows) for name, x in inputs.items()})
        return tuple(answer[:batch] for answer in answers.values())

    def _graph(self, rows: int, sampled: bool, confidence: bool) -> Captured:
        if rows not in self._caches:
            with self._graphs.turn():  # another stream may have computed the prefix
                self._caches[rows] = self.decoder.new_cache(rows)
        kind = rows, sampled, confidence
        if kind not in self._captured:
            decode = partial(_decode, self.decoder, self._caches[rows], confidence)
            self._captured[kind] = Captured(decode, self._graphs, warm_up=2)
        return self._captured[kind]


def _padded(x: Tensor, rows: int) -> Tensor:
    """[B, ...] -> [rows, ...]. Ones, because the temperature must not be 0."""
    if len(x) == rows:
        return x
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, rows - len(x)), value=1)


def _decode(decoder: Decoder, cache: KeyValueCache, confidence: bool, inputs: Tensors) -> dict[str, Tensor]:
    image = ImageFeatures(inputs["tokens"], tuple(x for name, x in inputs.items() if name.startswith("deep")))
    temperature, noise = inputs.get("temperature", 0.0), inputs.get("noise")
    answers = decoder.decode(cache, image, temperature, noise, confidence=confidence)
    return dict(zip(("action", "tokens", "confidence"), answers, strict=False))
