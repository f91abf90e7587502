"""Modes of torch that a caller has set reach neither answers nor rounds nor what is kept between them."""

from contextlib import contextmanager
from functools import cache

import pytest
import torch
from tiny import equal, make_nano, random_frames, weights_of

from covr_fast.vlm import ActionPrior, TunerConfig, VLMTuner


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "deterministic": deterministic,
}


def tune(prior: ActionPrior, frames: torch.Tensor, mode: str) -> float:
    config = TunerConfig(mode=mode, lora_rank=4, epochs=1, batch_size=4, micro_batch=4, shift=1)
    tuner = VLMTuner(prior, config)
    count = len(frames)
    actions = torch.full((count, 2), 0.5, device="cpu")
    tuner.start(frames, actions, torch.arange(count, dtype=torch.float32, device="cpu"))
    report = tuner.poll()
    tuner.publish()
    return report.loss_after


def answers(prior: ActionPrior, frames: torch.Tensor) -> list[torch.Tensor]:
    batches = (prior(frames), prior.reference(frames))
    assert not any(batch.action.is_inference() for batch in batches)
    assert all(batch.action.dtype == torch.float32 for batch in batches)
    return [tensor for batch in batches for tensor in (batch.token_ids, batch.action)]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def plain(request):
    return plain_results(request.param)


@cache  # and no fixture of the module, which would not run at the tests' number of threads
def plain_results(dtype):
    """What comes out where the caller has set nothing."""
    frames = random_frames((84, 84), 5, seed=1)
    rounds = {}
    for mode in ("lora", "full"):
        prior = make_nano(dtype=dtype)
        untuned = answers(prior, frames)
        rounds[mode] = tune(prior, frames, mode), answers(prior, frames)
    return dtype, frames, untuned, rounds


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("name", MODES)
def test_what_is_made_in_a_mode_serves_outside_of_it(plain, name, tuning):
    """A model opened in it, answers made in it; then answers and a round without it."""
    dtype, frames, untuned, rounds = plain
    with MODES[name]():
        prior = make_nano(dtype=dtype)
        assert equal(answers(prior, frames), untuned)
    assert equal(answers(prior, frames), untuned)
    assert tune(prior, frames, tuning) == rounds[tuning][0]
    assert equal(answers(prior, frames), rounds[tuning][1])


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("name", MODES)
def test_rounds_in_a_mode(plain, name, tuning):
    dtype, frames, _, rounds = plain
    prior = make_nano(dtype=dtype)
    with MODES[name]():
        assert tune(prior, frames, tuning) == rounds[tuning][0]
        assert equal(answers(prior, frames), rounds[tuning][1])
    assert equal(answers(prior, frames), rounds[tuning][1])


def test_frames_made_in_inference_mode_are_trained_on(nano):
    with torch.inference_mode():
        frames = torch.randint(0, 256, (6, 3, 84, 84), dtype=torch.uint8)
        actions, returns = torch.full((6, 2), 0.5), torch.arange(6.0)
        nano(frames)
    tuner = VLMTuner(nano, TunerConfig(mode="full", epochs=1, batch_size=4))
    tuner.start(frames, actions, returns)
    assert tuner.poll().steps == 2


def test_the_callers_modes_stay(nano, frames):
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        nano(frames)
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
    nano(frames)
    assert torch.is_grad_enabled()


def test_plans_made_in_inference_mode_are_trained_with(nano, frames):
    backbone = nano.backbone
    with torch.inference_mode():
        nano(frames)
    features = backbone.image_features(frames)
    features.tokens.sum().backward()
    assert backbone.tower.blocks[0].attn.qkv.weight.grad is not None


def test_nano_is_drawn_in_float32_whatever_the_default(shared_nano):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        prior = make_nano(dtype=torch.float32)
    finally:
        torch.set_default_dtype(before)
    assert equal(weights_of(prior), weights_of(shared_nano))
