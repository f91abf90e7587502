"""Priors that arrive after their step: on the right transitions, newest first, never waited for."""

import threading

import numpy as np
import pytest
import torch
from one_step_episodes import add_step, make_buffer

from covr_fast import ReplayBuffer
from covr_fast.labeller import PriorLabeller
from covr_fast.staleness import Trust
from covr_fast.vlm import ActionPrior


@pytest.fixture(scope="module")
def nano() -> ActionPrior:
    return ActionPrior.from_pretrained("nano", action_dim=2, device="cpu", seed=0)


def fill(buffer: ReplayBuffer, steps: int, seed: int = 0) -> torch.Tensor:
    """Adds `steps` one-step episodes per environment and returns their ids."""
    rng = np.random.default_rng(seed)
    return torch.cat([add_step(buffer, rng)[0] for _ in range(steps)])


def drain(labeller: PriorLabeller) -> None:
    """Steps until nothing is left to label."""
    pause = threading.Event()
    for _ in range(5000):
        labeller.step()
        if len(labeller) == 0:
            return
        pause.wait(0.002)
    raise AssertionError("the labeller did not come to an end")


class Watched:
    """A prior whose calls are recorded, and wait for `gate`."""

    def __init__(self, prior: ActionPrior) -> None:
        self.prior = prior
        self.calls: list[torch.Tensor] = []
        self.gate = threading.Event()
        self.gate.set()

    def __getattr__(self, name: str):
        return getattr(self.prior, name)

    def __call__(self, images: torch.Tensor, **options):
        assert self.gate.wait(30)
        self.calls.append(images)
        return self.prior(images, **options)


def test_labels_equal_what_the_prior_says_of_the_frames(nano):
    buffer = make_buffer()
    ids = fill(buffer, 6)
    wanted = ids[::3]
    labeller = PriorLabeller(nano, buffer, buffer.observations, max_batch=3)
    labeller.due(wanted.tolist())
    drain(labeller)
    labeller.close()
    extras = buffer.extras(ids)
    asked = torch.isin(ids, wanted)
    assert torch.equal(extras["prior_mask"], asked.float())
    assert torch.equal(extras["prior"][asked], nano(buffer.observations(wanted)).action)
    assert not extras["prior"][~asked].any()
    assert extras["prior_version"].tolist() == [0 if a else -1 for a in asked]


def test_nothing_waits_for_the_vlm_and_the_newest_come_first(nano):
    buffer = make_buffer()
    ids = fill(buffer, 4)
    prior = Watched(nano)
    prior.gate.clear()
    labeller = PriorLabeller(prior, buffer, buffer.observations, max_batch=5)
    labeller.due(ids[:4].tolist())
    assert labeller.step() == 0  # asked, not answered
    labeller.due(ids[4:].tolist())
    assert labeller.step() == 0
    assert not buffer.extras(ids)["prior_mask"].any()
    prior.gate.set()
    drain(labeller)
    labeller.close()
    assert [len(images) for images in prior.calls] == [4, 5, 5, 2]
    assert torch.equal(prior.calls[1], buffer.observations(ids[-5:]))
    assert buffer.extras(ids)["prior_mask"].all()


def test_what_the_ring_overwrites_is_dropped_and_its_heirs_stay_unlabelled(nano):
    buffer = make_buffer(capacity=16)
    old = fill(buffer, 4)
    prior = Watched(nano)
    prior.gate.clear()
    labeller = PriorLabeller(prior, buffer, buffer.observations, max_batch=8)
    labeller.due(old.tolist())
    labeller.step()
    new = fill(buffer, 4, seed=1)
    assert not buffer.contains(old).any()
    prior.gate.set()
    drain(labeller)
    labeller.close()
    assert labeller.dropped == len(old)
    assert not buffer.extras(new)["prior_mask"].any()


def test_the_mask_is_the_confidence_of_the_vlm(nano):
    buffer = make_buffer()
    ids = fill(buffer, 6)
    wanted = ids[::3]
    labeller = PriorLabeller(nano, buffer, buffer.observations, max_batch=3, confidence=True)
    labeller.due(wanted.tolist())
    drain(labeller)
    labeller.close()
    mask = buffer.extras(ids)["prior_mask"]
    asked = torch.isin(ids, wanted)
    expected = nano(buffer.observations(wanted), confidence=True).confidence
    torch.testing.assert_close(mask[asked], expected, rtol=0, atol=1e-5)
    assert not mask[~asked].any()
    assert len(set(mask[asked].tolist())) == len(wanted)
    logged = labeller.metrics.read()["prior_confidence"]
    assert expected.min() < logged < expected.max()


def test_the_confidence_of_what_the_ring_overwrites_goes_with_it(nano):
    buffer = make_buffer(capacity=16)
    old = fill(buffer, 3)
    prior = Watched(nano)
    prior.gate.clear()
    labeller = PriorLabeller(prior, buffer, buffer.observations, max_batch=12, confidence=True)
    labeller.due(old.tolist())
    labeller.step()
    expected = nano(buffer.observations(old), confidence=True).confidence
    fill(buffer, 2, seed=1)
    stored = buffer.contains(old)
    assert 0 < stored.sum() < len(old)
    prior.gate.set()
    drain(labeller)
    labeller.close()
    mask = buffer.extras(old[stored])["prior_mask"]
    torch.testing.assert_close(mask, expected[stored], rtol=0, atol=1e-5)


def test_refresh_labels_again_with_the_new_weights():
    prior = ActionPrior.from_pretrained("nano", action_dim=2, device="cpu", seed=0)
    buffer = make_buffer()
    ids = fill(buffer, 3)
    labeller = PriorLabeller(prior, buffer, buffer.observations)
    labeller.due(ids[:8].tolist())
    drain(labeller)
    with torch.no_grad():
        for weight in prior.backbone.model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    prior.weights_changed()
    before = buffer.extras(ids)["prior"]
    labeller.refresh()
    drain(labeller)
    labeller.close()
    after = buffer.extras(ids)
    assert after["prior_version"].tolist() == [1] * 8 + [-1] * 4
    assert torch.equal(after["prior"][:8], prior(buffer.observations(ids[:8])).action)
    assert not torch.equal(after["prior"], before)


class Late(Watched):
    """Its answers are made at once, and arrive when the gate opens."""

    def __init__(self, prior: ActionPrior) -> None:
        super().__init__(prior)
        self.answered = threading.Event()

    def __call__(self, images: torch.Tensor, **options):
        answer = self.prior(images, **options)
        self.answered.set()
        assert self.gate.wait(30)
        return answer


def test_refresh_also_reaches_what_the_old_weights_were_being_asked_about():
    prior = Late(ActionPrior.from_pretrained("nano", action_dim=2, device="cpu", seed=0))
    prior.gate.clear()
    buffer = make_buffer()
    ids = fill(buffer, 2)
    labeller = PriorLabeller(prior, buffer, buffer.observations)
    labeller.due(ids.tolist())
    labeller.step()
    assert prior.answered.wait(30)
    prior.prior.weights_changed()
    labeller.refresh()
    prior.gate.set()
    drain(labeller)
    labeller.close()
    assert buffer.extras(ids)["prior_version"].tolist() == [1] * len(ids)


@pytest.mark.parametrize(
    "trust, guides",
    [
        (Trust(max_staleness=0), 0.0),
        (Trust(max_staleness=1), 1.0),
        (None, 1.0),
        (Trust(first=1), 0.0),
        (Trust(first=2), 1.0),  # which nothing serves yet
    ],
)
def test_a_label_that_arrives_too_late_does_not_guide(trust, guides):
    prior = Late(ActionPrior.from_pretrained("nano", action_dim=2, device="cpu", seed=0))
    prior.gate.clear()
    buffer = make_buffer()
    ids = fill(buffer, 2)
    labeller = PriorLabeller(prior, buffer, buffer.observations, trust=trust)
    labeller.due(ids[:4].tolist())
    labeller.step()
    assert prior.answered.wait(30)
    prior.prior.weights_changed()  # while these are on their way
    prior.gate.set()
    drain(labeller)
    labeller.due(ids[4:].tolist())
    drain(labeller)
    extras = buffer.extras(ids)
    assert extras["prior_mask"].tolist() == [guides] * 4 + [1.0] * 4
    assert extras["prior_version"].tolist() == [0] * 4 + [1] * 4
    labeller.refresh()
    drain(labeller)
    labeller.close()
    assert buffer.extras(ids)["prior_mask"].tolist() == [1.0] * 8
    assert buffer.extras(ids)["prior_version"].tolist() == [1] * 8


def test_what_waits_and_what_is_labelled_survives_a_restart(nano):
    buffer = make_buffer()
    ids = fill(buffer, 4)
    prior = Watched(nano)
    first = PriorLabeller(prior, buffer, buffer.observations, max_batch=4)
    first.due(ids[:4].tolist())
    drain(first)
    prior.gate.clear()
    first.due(ids[4:].tolist())
    first.step()
    state = first.state_dict()
    prior.gate.set()
    first.close()

    second = PriorLabeller(nano, buffer, buffer.observations)
    second.load_state_dict(state)
    assert len(second) == len(ids) - 4
    second.refresh()
    assert len(second) == len(ids)
    drain(second)
    second.close()
    assert buffer.extras(ids)["prior_mask"].all()


def test_an_error_of_the_vlm_reaches_the_loop(nano):
    buffer = make_buffer()
    labeller = PriorLabeller(nano, buffer, lambda ids: torch.zeros(len(ids), 3, 56, 56))
    labeller.due(fill(buffer, 1).tolist())
    with pytest.raises(TypeError, match="images must be a uint8 tensor"):
        drain(labeller)
    labeller.close()


def test_a_batch_of_nothing_is_refused(nano):
    with pytest.raises(ValueError, match="max_batch is 0"):
        PriorLabeller(nano, make_buffer(), lambda ids: ids, max_batch=0)
