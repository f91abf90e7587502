"""What goes from the host to the device in a call: only by `streams.send`, so the host waits for nothing."""

import sys

import pytest
import torch
from tiny import ACTIONS, frames_for, seeded
from torch.overrides import TorchFunctionMode

from covr_fast.vlm import ActionPrior
from covr_fast.vlm import prior as prior_module
from covr_fast.vlm.finetune import objective
from covr_fast.vlm.finetune.objective import AnswerModel, Samples
from covr_fast.vlm.model import backbones, rows
from covr_fast.vlm.model.rows import training_attention


class Moves(TorchFunctionMode):
    """Writes down our own calls that could copy ordinary host memory to a device, were this one."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        moves = function in (torch.Tensor.to, torch.Tensor.cuda, torch.tensor, torch.as_tensor)
        to = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.device | torch.Tensor)]
        if moves and to and "site-packages" not in sys._getframe(1).f_code.co_filename:
            self.found.append(f"{function.__name__}({to})")
        return function(*args, **kwargs)


@pytest.fixture
def sent(monkeypatch) -> list[torch.Tensor]:
    """The tensors that went through `send`."""
    found: list[torch.Tensor] = []

    def send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
        assert values.is_cpu
        found.append(values)
        return values

    for module in (prior_module, backbones, objective, rows):
        monkeypatch.setattr(module, "send", send)
    return found


def test_frames_and_noise_are_sent(opened, sent):
    prior, frames = opened
    prior(frames, temperature=1.0, generator=seeded(0))  # makes what every later call uses
    for batch in (4, 3):
        sent.clear()
        with Moves() as moves:
            prior(frames[:batch], temperature=1.0, generator=seeded(0))
        assert moves.found == []
        noise, images = sent
        assert images.shape == frames[:batch].shape
        assert noise.shape[:2] == (batch, len(prior.grammar.levels))


@pytest.mark.parametrize("packing", ["on", "off"])
def test_answers_and_their_places_are_sent(opened, sent, packing):
    prior, frames = opened
    backbone = prior.backbone
    backbone.attention = training_attention(backbone.attention, packing)
    samples = Samples.build(prior.grammar, frames, ACTIONS, torch.ones(4))
    model = AnswerModel(backbone, prior.layout(tuple(frames.shape[2:])), checkpointing=False)
    lengths = samples.lengths(torch.arange(4))
    image = model.image(frames)
    model.hidden(image, samples.answers, lengths)
    sent.clear()
    with Moves() as moves:
        model.hidden(image, samples.answers, lengths)
    assert moves.found == []
    places = 2 if packing == "on" and len(lengths.unique()) > 1 else 0
    assert sent[0] is samples.answers
    assert len(sent) == 1 + places


def test_a_move_that_is_not_sent_is_found(nano, frames, monkeypatch):
    """The two tests above can fail."""
    nano(frames)
    monkeypatch.setattr(type(nano.backbone), "on_device", lambda self, images: images.to(self.device))
    with Moves() as moves:
        nano(frames)
    assert len(moves.found) == 1


@pytest.mark.needs_cuda
@pytest.mark.parametrize("graph", [True, False])
def test_no_call_waits_for_the_device(checkpoint, graph):
    prior = ActionPrior.from_pretrained(
        checkpoint, action_dim=2, prompt="Drive.", device="cuda", graph=graph, image_size=112
    )
    frames = frames_for(checkpoint)
    for _ in range(4):  # the third records its graphs
        prior(frames, temperature=1.0, generator=seeded(0))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        prior(frames, temperature=1.0, generator=seeded(0))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.needs_cuda
def test_frames_may_change_as_soon_as_a_call_returns(checkpoint):
    prior = ActionPrior.from_pretrained(
        checkpoint, action_dim=2, prompt="Drive.", device="cuda", dtype=torch.float32
    )
    frames = frames_for(checkpoint)
    expected = prior(frames.cuda()).token_ids
    for _ in range(3):
        given = frames.clone()
        answers = prior(given)
        given.zero_()
        assert torch.equal(answers.token_ids, expected)
