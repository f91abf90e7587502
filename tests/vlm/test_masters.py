"""Full fine-tuning of half-precision weights: small steps add up in float32."""

import pytest
import torch
from test_tuner import colours, quick
from tiny import equal, make_nano, weights_of

from covr_fast.vlm import ActionPrior
from covr_fast.vlm.finetune.masters import Masters


def test_steps_that_are_too_small_for_bfloat16_add_up():
    """A step of 1e-6 is 1/8000 of half a unit in the last place of 1."""
    weight = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    masters = Masters([weight])
    optimizer = torch.optim.SGD(masters.values, lr=1e-6)
    for step in range(10_000):
        weight.grad = torch.ones_like(weight)
        masters.collect_gradients()
        optimizer.step()
        optimizer.zero_grad()
        masters.round()
        if step == 100:
            assert (weight == 1).all()
    assert (weight == torch.tensor(0.99).bfloat16()).all()
    assert weight.grad is None


def test_gradients_add_up_in_float32():
    weight, other = (torch.ones(1, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    masters = Masters([weight, other])
    for _ in range(1000):
        (weight * 1.0).sum().backward()
        masters.collect_gradients()
    assert masters.values[0].grad.item() == 1000  # in bfloat16, 256 + 1 = 256
    assert masters.values[1].grad is None, "a weight without a gradient gets none"


def test_float32_weights_are_their_own_masters():
    weights = [torch.ones(2, requires_grad=True), torch.ones(2, dtype=torch.bfloat16, requires_grad=True)]
    masters = Masters(weights)
    assert masters.values[0] is weights[0]
    assert masters.values[1].dtype == torch.float32


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_a_learning_rate_of_1e_6_moves_bfloat16_weights(average):
    """AdamW's steps are about as large as the learning rate, whatever the gradient."""
    frames, actions = colours(4)
    prior = make_nano(dtype=torch.bfloat16)
    tuner = quick(prior, learning_rate=1e-6, warmup=0.0, epochs=60, held_out=0.0, average=average)
    before = weights_of(prior)
    tuner.start(frames, actions, torch.ones(4))
    assert tuner.poll().steps == 60
    tuner.publish()
    moved, size = 0, 0
    for a, b in zip(before, weights_of(prior), strict=True):
        assert b.dtype == torch.bfloat16
        # Weights that one step of 1e-6 cannot move: half a unit in their last place is at least 1.5e-5.
        large = a.abs() >= 2**-7
        moved, size = moved + int((a != b)[large].sum()), size + int(large.sum())
    # With the cosine 60 steps are about 3e-5, which is enough for the smallest of them.
    assert moved > 0.01 * size


def test_what_is_published_is_what_the_masters_round_to(monkeypatch):
    frames, actions = colours(16)
    prior = make_nano(dtype=torch.bfloat16)
    tuner = quick(prior, epochs=1, held_out=0.0)
    seen = []
    step = Masters.round
    monkeypatch.setattr(Masters, "round", lambda self: (step(self), seen.append(self.values))[0])
    tuner.start(frames, actions, torch.linspace(0, 1, 16))
    tuner.publish()
    assert equal([m.detach().bfloat16() for m in seen[-1]], weights_of(prior))


def test_lora_on_a_half_precision_base_is_float32_also_when_opened(tmp_path):
    prior = make_nano(dtype=torch.bfloat16)
    tuner = quick(prior, mode="lora", lora_rank=2, epochs=1)
    tuner.start(*colours(12), torch.ones(12))
    tuner.publish()
    prior.save_pretrained(tmp_path)
    opened = ActionPrior.from_pretrained(tmp_path, action_dim=2, device="cpu")
    assert opened.backbone.dtype == torch.bfloat16
    for each in (prior, opened):
        adapters = [p for name, p in each.backbone.model.named_parameters() if "lora_" in name]
        assert adapters
        assert {p.dtype for p in adapters} == {torch.float32}
        assert all(p.requires_grad for p in adapters)
    assert equal(weights_of(prior), weights_of(opened))
