"""COVR, its baselines and its ablations: each changes what it says, and nothing else."""

import math

import numpy as np
import pytest
import torch
from one_step_episodes import ENVS, SHAPE
from round_stubs import Tuner, make_log
from small_runs import small_config

from covr_fast import ReplayBuffer, TrainConfig, ops
from covr_fast.agents import SAC, AgentConfig
from covr_fast.best_returns import SAMPLER, BestReturns
from covr_fast.buffer import FineTuneView
from covr_fast.errors import UserError
from covr_fast.files import full_names
from covr_fast.judge import AgentJudge
from covr_fast.methods import METHODS
from covr_fast.presets import PRESETS
from covr_fast.rounds import Rounds

FROZEN = {"covr.vlm": "frozen", "covr.cold_start": 0}
NO_VLM = {"covr.vlm": "off"}
SETS = {
    "covr": {},
    "off": NO_VLM,
    "vbe": {"covr.vlm": "frozen", "covr.decides": "vlm"},
    "dpl": FROZEN,
    "apl": {**FROZEN, "covr.decay": 1.0},
    "vpf": {"covr.decides": "vlm", "vlm.temperature": 1.0},
    "per": {**NO_VLM, "replay.sampler": "prioritized"},
    "ere": {**NO_VLM, "replay.sampler": "recent"},
    "m1": {"covr.filter": "random"},
    "m2": {"covr.filter": "top"},  # 0.8 is the default
    "m3": {"covr.filter": "top", "covr.top_share": 0.9},
    "m4": {"covr.filter": "top", "covr.top_share": 0.95},
    "m5": {"covr.z_score": False},
    "m6": {"covr.score": "reward"},
    "m7": {"covr.score": "q"},
    "m8": {"covr.weights": "equal"},
    "m9": {"covr.weights": "random"},
    "m10": {**NO_VLM, "replay.sampler": "best", "replay.best_share": 0.8},
    "m11": {**NO_VLM, "replay.sampler": "best"},  # 0.5 is the default
}
"""The settings of each method that are not COVR's."""


@pytest.mark.parametrize("method", METHODS)
def test_a_method_sets_what_it_says_and_nothing_else(method):
    covr = full_names(TrainConfig.preset("racetrack").to_dict())
    config = TrainConfig.preset("racetrack", method=method)
    ours = full_names(config.to_dict())
    changed = {name: ours[name] for name in ours if ours[name] != covr[name]}
    assert changed == {
        **SETS[method],
        **({} if method == "covr" else {"method": method}),
    }


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_goes_with_every_preset_and_agent(preset, method):
    for kind in (None, "sac", "drq", "drqv2", "deepmdp"):
        TrainConfig.preset(preset, "nano", kind, method).check()


def test_an_unknown_method_is_refused_with_similar_names():
    with pytest.raises(UserError, match="unknown method 'dlp': did you mean dpl"):
        TrainConfig.preset("racetrack", method="dlp")


# ---- rounds on a fixed D_f --------------------------------------------------------------------------

ACTIONS, LENGTH = 2, 5


def filled_buffer(sampler="uniform") -> ReplayBuffer:
    """Eight episodes of five steps in each of four environments, with random pictures, actions and rewards
    whose order is not that of the returns."""
    extras = {"prior": (ACTIONS,), "prior_mask": (), "prior_version": ((), torch.int64)}
    buffer = ReplayBuffer(
        400, num_envs=ENVS, obs_shape=SHAPE, action_shape=(ACTIONS,), seed=0, extras=extras, sampler=sampler
    )
    rng = np.random.default_rng(0)
    obs = rng.integers(0, 256, (ENVS, *SHAPE), dtype=np.uint8)
    for step in range(8 * LENGTH):
        after = rng.integers(0, 256, (ENVS, *SHAPE), dtype=np.uint8)
        ended = np.full(ENVS, step % LENGTH == LENGTH - 1)
        action = rng.uniform(-1, 1, (ENVS, ACTIONS)).astype(np.float32)
        unlabelled = {"prior": np.zeros_like(action), "prior_mask": np.zeros(ENVS)}
        buffer.add(
            obs, action, rng.normal(size=ENVS), after, ended, ~ended & False,
            prior_version=np.full(ENVS, -1), **unlabelled,
        )  # fmt: skip
        obs = rng.integers(0, 256, (ENVS, *SHAPE), dtype=np.uint8) if ended[0] else after
    return buffer


@pytest.fixture(scope="module")
def agent():
    config = AgentConfig(channels=(8,), strides=(4,), latent=8, hidden=16)
    return SAC(SHAPE, (ACTIONS,), config, seed=0)


def round_of(method: str, agent: SAC, folder, seed: int = 0):
    """What the tuner is given by a round of this method on the fixed D_f, and what is logged of the round."""
    config = small_config(env__grayscale=False, env__frame_stack=1, vlm__motion=False, replay__augment="none")
    config.env.height, config.env.width = SHAPE[1:]
    config.seed, config.covr.psi_0 = seed, 10
    METHODS[method].change(config)
    buffer, tuner = filled_buffer(), Tuner()
    rounds = Rounds(config, AgentJudge(config, agent, buffer), buffer, tuner)
    log = make_log(folder)
    agent.generator.manual_seed(0)
    rounds.advance(10, log)
    ((_, actions, scores, _),) = tuner.given
    where = buffer.actions(finished(buffer).indices)
    kept = torch.tensor([int((where == action).all(1).nonzero()[0, 0]) for action in actions])
    return kept, scores, tuner.weights, log.figures


def finished(buffer: ReplayBuffer) -> FineTuneView:
    return FineTuneView(buffer, small_config().replay.gamma)


def threshold(scores: np.ndarray, figures) -> float:
    """Eq. 5 in units of the scores, with numpy."""
    low, median, high = np.percentile(scores, (25, 50, 75))
    return median + (high - low) / (1 + math.exp(figures["round/entropy"]))


RETURNS = finished(filled_buffer()).returns.numpy()
REWARDS = finished(filled_buffer()).rewards.numpy()


@pytest.fixture
def covr(agent, tmp_path):
    return round_of("covr", agent, tmp_path)


def test_covr_keeps_what_is_above_the_threshold_and_leaves_weights_to_ralw(covr):
    kept, scores, weights, figures = covr
    assert kept.tolist() == np.flatnonzero(threshold(RETURNS, figures) < RETURNS).tolist()
    assert torch.equal(scores, torch.from_numpy(RETURNS)[kept])
    assert weights is None
    assert 10 < len(kept) < 100


def test_m1_keeps_as_many_at_random(agent, tmp_path, covr):
    kept, scores, weights, figures = round_of("m1", agent, tmp_path)
    assert len(kept) == len(covr[0]) == figures["round/kept"]
    assert kept.unique().tolist() == kept.tolist()
    assert torch.equal(scores, torch.from_numpy(RETURNS)[kept])
    assert weights is None
    chance = len(kept) / len(RETURNS)
    assert np.isin(kept, covr[0]).mean() == pytest.approx(chance, abs=0.2), "it looks at the returns"
    other, *_ = round_of("m1", agent, tmp_path, seed=1)
    assert kept.tolist() != other.tolist()


@pytest.mark.parametrize("method, share", [("m2", 0.8), ("m3", 0.9), ("m4", 0.95)])
def test_m2_to_m4_keep_the_top_share(method, share, agent, tmp_path):
    kept, scores, weights, figures = round_of(method, agent, tmp_path)
    best = np.sort(np.argsort(RETURNS)[-math.ceil(share * len(RETURNS)) :])
    assert kept.tolist() == best.tolist()
    assert weights is None
    least = scores.min().item()
    assert figures["round/cutoff"] == pytest.approx(least)
    assert figures["round/tau"] == pytest.approx((least - RETURNS.mean()) / RETURNS.std(), abs=1e-5)


def test_m5_measures_in_returns_which_keeps_the_same(agent, tmp_path, covr):
    """z-scores are linear in the returns, so Eq. 5 without them keeps the same samples."""
    kept, _, weights, figures = round_of("m5", agent, tmp_path)
    assert kept.tolist() == covr[0].tolist()
    assert weights is None
    assert figures["round/tau"] == pytest.approx(threshold(RETURNS, figures), abs=1e-5)
    assert covr[3]["round/tau"] != pytest.approx(figures["round/tau"])


def test_m6_judges_by_rewards(agent, tmp_path, covr):
    kept, scores, weights, figures = round_of("m6", agent, tmp_path)
    assert kept.tolist() == np.flatnonzero(threshold(REWARDS, figures) < REWARDS).tolist()
    assert kept.tolist() != covr[0].tolist()
    assert torch.equal(scores, torch.from_numpy(REWARDS)[kept])
    assert weights is None


def test_m7_judges_by_the_critic(agent, tmp_path, covr):
    kept, scores, weights, figures = round_of("m7", agent, tmp_path)
    buffer = filled_buffer()
    ids = finished(buffer).indices
    with torch.no_grad():
        features = agent.encoder(buffer.observations(ids).float() / 255)
        q = agent.critic(features, buffer.actions(ids)).amin(0).numpy()
    assert kept.tolist() == np.flatnonzero(threshold(q, figures) < q).tolist()
    assert kept.tolist() != covr[0].tolist()
    np.testing.assert_allclose(scores, q[kept], rtol=1e-5)
    assert weights is None


def test_m8_weighs_all_alike(agent, tmp_path, covr):
    kept, scores, weights, _ = round_of("m8", agent, tmp_path)
    assert kept.tolist() == covr[0].tolist()
    assert torch.equal(scores, covr[1])
    assert torch.equal(weights, torch.ones(len(kept)))


def test_m9_weighs_at_random(agent, tmp_path, covr):
    kept, scores, weights, _ = round_of("m9", agent, tmp_path)
    assert kept.tolist() == covr[0].tolist()
    assert torch.equal(scores, covr[1])
    assert weights.shape == kept.shape
    assert 0 <= weights.min() < 0.3 < 0.7 < weights.max() < 1
    assert abs(np.corrcoef(weights, scores)[0, 1]) < 0.5
    assert not torch.equal(weights, ops.return_weights(scores))


# ---- replay -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_m10_and_m11_draw_half_of_a_batch_from_the_best(share):
    buffer = filled_buffer(SAMPLER)
    config = small_config(replay__sampler="best", replay__best_share=share)
    best = BestReturns(config, buffer)
    ids = finished(buffer).indices
    best.added(ids, before=0, decisions=len(ids))
    top = ids[torch.from_numpy(RETURNS).topk(round(share * len(RETURNS))).indices]

    drawn = buffer.sample(4000)
    assert torch.isin(drawn.index, top).float().mean() == pytest.approx(share, abs=0.04), "not yet chosen"
    best.choose()
    drawn = buffer.sample(4000)
    assert torch.isin(drawn.index, top).float().mean() == pytest.approx((1 + share) / 2, abs=0.04)
    assert torch.equal(drawn.weight, torch.ones(4000))
    newest = ids.max().item()
    best.added(torch.tensor([newest]), before=0, decisions=1)
    counts = torch.bincount(buffer.sample(4000).index, minlength=newest + 1)
    assert counts[newest] < 2 * 4000 / len(ids) + 15, "a new transition counts as one of the best"


def test_the_updates_leave_these_priorities_alone():
    from covr_fast.parts import new_batches

    buffer = filled_buffer(SAMPLER)
    config = small_config(replay__sampler="best", replay__augment="none")
    batches = new_batches(config, buffer)
    assert (batches.prioritized, batches.update_priorities) == (False, None)
