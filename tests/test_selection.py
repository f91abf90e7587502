"""EDDF in the loop: what it selects of D_f, and when the tuner gets it."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from one_step_episodes import ENVS, SHAPE, make_buffer
from round_stubs import Tuner, make_log
from small_runs import small_config

from covr_fast import ops
from covr_fast.agents import SAC, AgentConfig
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


@pytest.fixture
def log(tmp_path):
    return make_log(tmp_path)


def make_rounds(buffer: ReplayBuffer) -> Rounds:
    config = small_config(env__grayscale=False, vlm__motion=False, covr__psi_0=10)
    judge = SimpleNamespace(entropy=lambda ids: ENTROPY, action_dim=2)
    return Rounds(config, judge, buffer, Tuner())


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_what_is_selected_is_what_the_filter_keeps(device):
    buffer = make_buffer(device=device)
    add_episodes(buffer, *range(10))
    view, asked = FineTuneView(buffer, 0.9), []
    selection = Selection(view, lambda ids: asked.append(ids) or ENTROPY.to(device), "equation", 2)
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


@pytest.mark.parametrize("threshold, sign", [("described", -1), ("equation", 1)])
@pytest.mark.parametrize("reduction, divisor", [("sum", 1), ("mean", 6)])
def test_the_entropy_of_eq_5_is_a_sum_or_a_mean_over_the_numbers_of_an_action(
    reduction, divisor, threshold, sign
):
    buffer = make_buffer()
    add_episodes(buffer, *range(10))
    nats = torch.tensor(-6.0)
    kept, figures = Selection(FineTuneView(buffer, 0.9), lambda _: nats, threshold, 6, reduction).read()
    returns = torch.arange(10.0).repeat(ENVS)
    expected = ops.exploration_filter(returns, -6.0 / divisor, threshold=threshold)
    assert torch.equal(kept, expected.indices)
    assert figures["tau"] == pytest.approx(expected.tau)
    assert (figures["entropy"], figures["entropy_per_number"]) == (-6, -1)
    coefficient = figures["iqr_coefficient"]
    assert coefficient == pytest.approx(1 / (1 + math.exp(-sign * -6 / divisor)))
    # Eq. 5, in units of the returns.
    quartiles = np.percentile(returns, (25, 50, 75))
    assert figures["cutoff"] == pytest.approx(quartiles[1] + coefficient * (quartiles[2] - quartiles[0]))


def coefficients(action_dim: int, reduction: str, nats_per_number: float) -> float:
    buffer = make_buffer()
    add_episodes(buffer, 1.0, 2.0)
    nats = torch.tensor(nats_per_number * action_dim)
    selection = Selection(FineTuneView(buffer, 0.9), lambda _: nats, "described", action_dim, reduction)
    return selection.read()[1]["iqr_coefficient"]


def untrained_entropy(action_dim: int) -> float:
    """Nats per number of an action, of the policy before any update."""
    agent = SAC((3, 21, 21), (action_dim,), AgentConfig(channels=(8,), strides=(2,), hidden=64))
    obs = torch.randint(0, 256, (2048, 3, 21, 21), generator=torch.Generator().manual_seed(0)).byte()
    return agent.entropy(obs).item() / action_dim


@pytest.mark.parametrize("action_dim", [1, 2, 6])
def test_the_sum_saturates_the_sigmoid_where_actions_have_many_numbers(action_dim):
    """The table of docs/training.md: from uniform actions and the untrained policy to the target entropy,
    which is -1 nat per number."""
    nats = [math.log(2), untrained_entropy(action_dim), -1.0]
    assert nats[1] == pytest.approx(-0.13, abs=0.03)
    sums, means = ([coefficients(action_dim, how, each) for each in nats] for how in ("sum", "mean"))
    table = {1: (0.333, 0.53, 0.731), 2: (0.2, 0.56, 0.881), 6: (0.015, 0.69, 0.9975)}
    assert sums == pytest.approx(table[action_dim], abs=0.03)
    assert (sums[0], sums[2]) == pytest.approx((table[action_dim][0], table[action_dim][2]), abs=5e-4)
    assert means == pytest.approx(table[1], abs=0.01), "the mean depends on the number of dimensions"


def test_a_return_that_is_not_finite_says_that_training_diverged():
    buffer = make_buffer()
    add_episodes(buffer, 1.0, 2.0, 3.0)
    view = FineTuneView(buffer, 0.9, bootstrap=lambda ids: torch.full((len(ids),), torch.nan))
    buffer.set_truncated([5], [True])
    with pytest.raises(DivergedError, match=r"a return of D_f .* is NaN or infinite"):
        Selection(view, lambda ids: ENTROPY, "described", 2).read()


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
    log_prob = lambda images, actions: torch.zeros(len(images))  # noqa: E731
    rounds._tuner.prior = SimpleNamespace(version=1, log_prob=log_prob)
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


def test_a_round_that_tuned_says_its_version_and_counts(log):
    record = told(log)
    assert (record["version"], record["tuned_rounds"]) == (1, 1)
    assert "cold_start" not in log.said[-1]


def test_a_round_whose_filter_kept_nothing_does_not_count_towards_the_cold_start(log):
    """All returns are equal, as where every reward is zero."""
    buffer = make_buffer()
    add_episodes(buffer, 0.0, 0.0, 0.0)
    rounds = make_rounds(buffer)
    assert rounds._config.covr.cold_start == 1
    rounds.advance(10, log)
    assert not rounds._tuner.given
    (record,) = rounds.records
    assert (record["kept"], record["tuned_rounds"]) == (0, 0)
    assert "version" not in record
    assert log.said[-1].endswith("nothing was tuned, so it does not count towards covr.cold_start")
    assert not rounds.guiding
    assert (rounds.schedule.rounds, rounds.schedule.next_round) == (1, 30), "the schedule stands still"
