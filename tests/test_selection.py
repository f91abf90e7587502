"""EDDF in the loop: what it selects of D_f, and when the tuner gets it."""

import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from one_step_episodes import ENVS, SHAPE, make_buffer
from small_runs import small_config

from covr_fast import ops
from covr_fast.buffer import FineTuneView, ReplayBuffer
from covr_fast.errors import DivergedError
from covr_fast.rounds import Rounds
from covr_fast.selection import Selection
from covr_fast.vlm.finetune.round import RoundReport

ENTROPY = torch.tensor(0.5)
ON_GPU = pytest.param("cuda", marks=pytest.mark.needs_cuda)


def add_episodes(buffer: ReplayBuffer, *rewards: float) -> None:
    """One episode of one step per environment and reward."""
    for reward in rewards:
        obs, after = np.zeros((2, ENVS, *SHAPE), np.uint8)
        ended, zeros = np.ones(ENVS, bool), np.zeros((ENVS, 2), np.float32)
        unlabelled = {"prior": zeros, "prior_mask": zeros[:, 0], "prior_version": np.full(ENVS, -1)}
        buffer.add(obs, zeros, np.full(ENVS, reward), after, ended, ~ended, **unlabelled)


class Tuner:
    """Writes down what it is given, and is done at once."""

    running = False
    rounds = 0

    def __init__(self) -> None:
        self.given: list[tuple[torch.Tensor, ...]] = []

    def start(self, *samples: torch.Tensor) -> None:
        self.given.append(samples)

    def check(self) -> None: ...
    def wait(self) -> None: ...


@pytest.fixture
def log():
    said: list[str] = []
    nothing = lambda *_: None  # noqa: E731
    return SimpleNamespace(clock=lambda _: nullcontext(), say=said.append, scalars=nothing, said=said)


def make_rounds(buffer: ReplayBuffer) -> Rounds:
    config = small_config(env__grayscale=False, vlm__motion=False, covr__psi_0=10)
    agent = SimpleNamespace(entropy=lambda obs: ENTROPY)
    return Rounds(config, agent, buffer, Tuner())


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_what_is_selected_is_what_the_filter_keeps(device):
    buffer = make_buffer(device=device)
    add_episodes(buffer, *range(10))
    view, asked = FineTuneView(buffer, 0.9), []
    selection = Selection(view, lambda ids: asked.append(ids) or ENTROPY.to(device), "equation")
    view.clear()
    assert selection.waits == (device == "cuda")
    kept, figures = selection.read()
    returns = torch.arange(10.0).repeat(ENVS)
    expected = ops.exploration_filter(returns, 0.5, threshold="equation")
    assert torch.equal(kept, expected.indices)
    assert (figures["tau"], figures["cutoff"]) == pytest.approx((expected.tau, expected.cutoff))
    assert (figures["samples"], figures["kept"], figures["entropy"]) == (40, len(kept), 0.5)
    assert sorted(asked[0].tolist()) == list(range(40))
    ids, chosen, episodes = selection.samples(kept)
    assert chosen.device.type == device
    assert torch.equal(chosen.cpu(), returns[kept])
    assert torch.equal(ids % ENVS, kept // 10)  # D_f lists one environment after another
    assert torch.equal(episodes, ids)  # which are of one step


def test_a_return_that_is_not_finite_says_that_training_diverged():
    buffer = make_buffer()
    add_episodes(buffer, 1.0, 2.0, 3.0)
    view = FineTuneView(buffer, 0.9, bootstrap=lambda ids: torch.full((len(ids),), torch.nan))
    buffer.set_truncated([5], [True])
    with pytest.raises(DivergedError, match=r"a return of D_f .* is NaN or infinite"):
        Selection(view, lambda ids: ENTROPY, "described").read()


def test_on_a_cpu_the_tuner_begins_when_the_round_is_due(log):
    buffer = make_buffer()
    add_episodes(buffer, 5.0, 4.0, 3.0, 2.0)
    rounds = make_rounds(buffer)
    rounds.advance(9, log)
    assert not rounds._tuner.given
    rounds.advance(10, log)
    (_, actions, returns, episodes), (record,) = rounds._tuner.given[0], rounds.records
    assert episodes.tolist() == list(range(ENVS))
    assert returns.tolist() == [5.0] * ENVS
    assert len(actions) == record["kept"] == ENVS
    assert (record["step"], record["published"]) == (10, 10)


@pytest.fixture
def waiting(monkeypatch) -> None:
    """As if the result of the filter were on its way from a GPU."""
    monkeypatch.setattr(Selection, "waits", property(lambda _: True))


def test_what_must_be_waited_for_is_read_in_the_next_call(waiting, log):
    buffer = make_buffer()
    add_episodes(buffer, 5.0, 4.0, 3.0, 2.0)
    rounds = make_rounds(buffer)
    before = rounds.state_dict()
    rounds.advance(10, log)
    assert not rounds._tuner.given
    assert len(rounds.finished) == 0
    assert torch.equal(rounds.state_dict()["finished"]["consumed"], before["finished"]["consumed"])
    add_episodes(buffer, 9.0)  # of the next round
    rounds.advance(14, log)
    assert rounds._tuner.given[0][2].tolist() == [5.0] * ENVS
    assert (rounds.records[0]["step"], rounds.records[0]["published"]) == (10, 14)
    assert len(rounds.finished) == ENVS


def test_samples_that_the_ring_overwrites_in_between_are_left_out(waiting, log):
    buffer = make_buffer(4 * ENVS)
    add_episodes(buffer, 5.0, 5.0, 3.0, 2.0)
    rounds = make_rounds(buffer)
    rounds.advance(10, log)
    add_episodes(buffer, 9.0)  # in the place of the first
    rounds.advance(14, log)
    images, actions, returns, _ = rounds._tuner.given[0]
    assert len(images) == len(actions) == len(returns) == ENVS
    assert returns.tolist() == [5.0] * ENVS
    assert (rounds.records[0]["kept"], rounds.records[0]["overwritten"]) == (2 * ENVS, ENVS)
    assert any("4 steps were overwritten" in text for text in log.said)


def test_a_round_that_has_not_begun_when_the_steps_end_is_still_done(waiting, log):
    buffer = make_buffer()
    add_episodes(buffer, 5.0, 4.0, 3.0, 2.0)
    rounds = make_rounds(buffer)
    rounds.advance(10, log)
    rounds.finish(10, log)
    assert len(rounds._tuner.given) == 1
    assert rounds.schedule.rounds == 1


# ---- what is said of a round ----


def told(log, **changes) -> dict:
    """The record of a round with this report."""
    report = RoundReport(
        round=1,
        samples=4,
        trained=4,
        held_out=0,
        episodes=4,
        nonzero_share=1.0,
        loss_before=math.nan,
        loss_after=math.nan,
        lora_lost=None,
        lora_beside=False,
        steps=1,
        seconds=1.0,
    )
    buffer = make_buffer()
    add_episodes(buffer, 5.0, 4.0, 3.0, 2.0)
    rounds = make_rounds(buffer)
    rounds._tuner.wait = lambda: replace(report, **changes)
    rounds._tuner.publish = lambda: 1
    rounds._tuner.prior = SimpleNamespace(log_prob=lambda images, actions: torch.zeros(len(images)))
    rounds.advance(10, log)
    return rounds.records[0]


def test_a_round_of_one_episode_says_that_it_has_no_loss(log):
    record = told(log, episodes=1)
    assert "loss_after" not in record
    assert "no held-out loss: all samples are of one episode" in log.said[-1]
    assert (record["episodes"], record["held_out"]) == (1, 0)


def test_a_round_with_losses_says_them(log):
    record = told(log, held_out=1, loss_before=2.0, loss_after=1.5)
    assert (record["loss_before"], record["loss_after"], record["held_out"]) == (2.0, 1.5, 1)
    assert "held-out loss 2.000 -> 1.500" in log.said[-1]
    assert "one episode" not in log.said[-1]


@pytest.mark.parametrize(
    ("lost", "beside", "line"),
    [(0.81, True, True), (0.001, False, False), (None, False, False), (math.nan, True, False)],
)
def test_a_round_says_why_lora_is_not_merged(lost, beside, line, log):
    record = told(log, lora_lost=lost, lora_beside=beside)
    said = "LoRA is served beside the base: merged into its half precision it would lose 81% of its change"
    assert (said in log.said) == line
    assert record.get("lora_lost") == (lost if lost in (0.81, 0.001) else None)
