"""Replayed decoding gives the decoder's answers: filling up and bookkeeping anywhere, the graphs on a GPU."""

import gc
import weakref

import pytest
import torch
from fake_graphs import FakeGraphs
from tiny import open_prior, random_frames, seeded

from covr_fast.vlm import ActionPrior
from covr_fast.vlm.decode.decoder import Decoder, DecoderWeights
from covr_fast.vlm.decode.graph import GraphedDecoder

SIZE = (84, 84)


def frames(count, seed=1):
    return random_frames(SIZE, count, seed)


def make_decoder(prior):
    return Decoder(DecoderWeights(prior.backbone, prior.grammar), prior.layout(SIZE))


def graphed(prior):
    """The prior, decoding by (fake) graphs from its next call on, and what was asked of them."""
    graphs = FakeGraphs()
    decoder = make_decoder(prior)
    prior._decoders[SIZE] = GraphedDecoder(decoder, graphs)
    return graphs.events


def check_batches(ours, theirs, temperature):
    """Batches of many sizes, whose answers are returned in pairs."""
    pairs = []
    for call, count in enumerate((5, 7, 8, 1, 6, 3, 5, 8, 1, 1, 5)):
        images = frames(count, seed=call).to(ours.device)
        got, expected = (
            prior(images, temperature=temperature, generator=seeded(call)) for prior in (ours, theirs)
        )
        assert torch.equal(got.token_ids, expected.token_ids)
        assert torch.equal(got.action, expected.action)
        pairs.append((got, expected))
    return pairs


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_answers_do_not_depend_on_filling_up(nano, shared_nano, temperature):
    events = graphed(nano)
    kept = check_batches(nano, shared_nano, temperature)
    for got, expected in kept:  # and later calls left them be
        assert torch.equal(got.token_ids, expected.token_ids)
    # Sizes 5 to 8 share a graph, recorded at their third call; so do the three calls of size 1.
    assert events.count("capture") == 2
    assert events.count("replay") == 6
    assert events.count("aside") == 5


def test_temperatures_share_a_graph(nano, shared_nano):
    events = graphed(nano)
    for call, temperature in enumerate((0.5, 1.0, 0.7, 2.0, 0.0, 0.3)):
        answers = [
            prior(frames(4), temperature=temperature, generator=seeded(call)) for prior in (nano, shared_nano)
        ]
        assert torch.equal(answers[0].token_ids, answers[1].token_ids)
    assert events.count("capture") == 1


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_confidence_is_replayed_too(nano, shared_nano, temperature):
    events = graphed(nano)
    for call, count in enumerate((3, 4, 3, 4, 3)):
        options = {"temperature": temperature, "confidence": True}
        got, expected = (
            prior(frames(count, call), generator=seeded(call), **options) for prior in (nano, shared_nano)
        )
        assert torch.equal(got.token_ids, expected.token_ids)
        torch.testing.assert_close(got.confidence, expected.confidence, rtol=0, atol=1e-5)
        assert nano(frames(count, call)).confidence is None
    assert events.count("capture") == 2  # with and without
    assert events.count("replay") == 6


def test_every_backbone(checkpoint):
    prior = open_prior(checkpoint)
    decoder = make_decoder(prior)
    graphs = FakeGraphs()
    replayed = GraphedDecoder(decoder, graphs)
    for call in range(4):
        with torch.no_grad():
            image = prior.backbone.image_features(frames(3, seed=call))
        for got, expected in zip(replayed(image, 0.0, None), decoder(image, 0.0, None), strict=True):
            assert torch.equal(got, expected)
        # Keys and values too: tokens hardly show Qwen3-VL's features, which enter several layers.
        for got, expected in zip(replayed._caches[4].layers, decoder._cache(3).layers, strict=True):
            torch.testing.assert_close(got.keys[:3], expected.keys)
            torch.testing.assert_close(got.values[:3], expected.values)
    assert graphs.events.count("replay") == 2


def test_graphs_go_when_weights_are_published(nano):
    graphed(nano)
    for _ in range(4):
        nano(frames(2))
    gone = weakref.ref(nano._decoders[SIZE].decoder.weights)
    gc.disable()  # a copy of the model's weights must not wait for it
    try:
        nano.weights_changed()
        assert gone() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------------- on a GPU


def cuda_priors():
    """The same in float32, decoding eagerly and by graphs."""
    options = {"action_dim": 2, "device": "cuda", "dtype": torch.float32, "seed": 0}
    return [ActionPrior.from_pretrained("nano", graph=graph, **options) for graph in (False, True)]


@pytest.mark.needs_cuda
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_cuda_graphs_answer_as_the_decoder_does(temperature):
    eager, replayed = cuda_priors()
    check_batches(replayed, eager, temperature)
    assert [type(prior._decoders[SIZE]) for prior in (eager, replayed)] == [Decoder, GraphedDecoder]


@pytest.mark.needs_cuda
def test_cuda_graphs_do_not_grow_and_follow_new_weights():
    eager, replayed = cuda_priors()
    images = frames(6).cuda()
    for _ in range(4):
        replayed(images)
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    for _ in range(100):
        replayed(images)
    assert torch.cuda.memory_allocated() == allocated
    for prior in (eager, replayed):
        with torch.no_grad():
            for weight in prior.backbone.model.parameters():
                weight.mul_(1.1)
        prior.weights_changed()
    for _ in range(4):
        assert torch.equal(replayed(images).token_ids, eager(images).token_ids)
