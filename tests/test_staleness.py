"""Priors of old weights: which still guide, and what is logged of their age."""

import numpy as np
import pytest
import torch
from one_step_episodes import ENVS, SHAPE, make_buffer
from small_runs import run_until, small_config

from covr_fast import ReplayBuffer, Trainer
from covr_fast.report import read_metrics
from covr_fast.staleness import age_figures, mask_older, oldest_guiding, stored_priors

ON_GPU = pytest.param("cuda", marks=pytest.mark.needs_cuda)


def filled(versions: list[int], capacity: int = 64, **options) -> tuple[ReplayBuffer, torch.Tensor]:
    """A buffer with a step of all environments per version, whose priors are of that version; and its ids.
    Each environment has another mask, as priors of different confidence have."""
    buffer = make_buffer(capacity, **options)
    rng, ended, ids = np.random.default_rng(0), np.ones(ENVS, bool), []
    for version in versions:
        obs, after = rng.integers(0, 256, (2, ENVS, *SHAPE), dtype=np.uint8)
        action = rng.uniform(-1, 1, (ENVS, 2)).astype(np.float32)
        mask = np.linspace(0.25, 1, ENVS) * (version >= 0)
        extras = {"prior": action, "prior_mask": mask, "prior_version": np.full(ENVS, version)}
        ids.append(buffer.add(obs, action, mask, after, ended, ~ended, **extras))
    return buffer, torch.cat(ids)


def test_what_guides_by_version():
    assert [oldest_guiding(v, None) for v in (0, 5)] == [0, 0]
    assert [oldest_guiding(v, 2) for v in (0, 2, 3, 5)] == [0, 0, 1, 3]
    assert oldest_guiding(5, 0) == 5


@pytest.mark.parametrize("capacity", [64, 13])  # 13: rings of different sizes, which are overwritten
def test_the_stored_priors_are_found_with_their_versions(capacity):
    buffer, ids = filled([0, -1, 1, 2, -1, 3], capacity)
    kept = ids[buffer.contains(ids)]
    versions = buffer.extras(kept)["prior_version"]
    expected = dict(zip(kept[versions >= 0].tolist(), versions[versions >= 0].tolist(), strict=True))
    found = stored_priors(buffer)
    assert dict(zip(*(values.tolist() for values in found), strict=True)) == expected
    assert len(found[0]) == len(expected) > 0


def test_a_new_buffer_has_no_priors():
    """Its columns are zeros, which would be version 0."""
    assert len(stored_priors(make_buffer())[0]) == 0
    assert age_figures(make_buffer(), 0, 0) == {"prior/usable_share": 0.0}


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_older_priors_are_masked_and_the_others_are_left_as_they_are(device):
    buffer, ids = filled([0, 1, -1, 2, 3], device=device)
    before = buffer.extras(ids)
    mask_older(buffer, 2)
    after = buffer.extras(ids)
    newer = before["prior_version"] >= 2
    assert torch.equal(after["prior_mask"], torch.where(newer, before["prior_mask"], 0))
    assert after["prior_mask"].any()
    for name in ("prior", "prior_version"):
        assert torch.equal(after[name], before[name])
    drawn = buffer.sample(256)  # what a batch has, which a GPU makes of its copy of the columns
    drawn_mask = dict(zip(drawn.index.tolist(), drawn.extras["prior_mask"].tolist(), strict=True))
    assert drawn_mask == dict(zip(ids.tolist(), after["prior_mask"].tolist(), strict=True))


def test_figures_of_age():
    buffer, _ = filled([0, 1, -1, 1, 3])
    assert age_figures(buffer, 3, 0) == {
        "prior/usable_share": 16 / 20,
        "prior/age_mean": (3 + 2 + 2 + 0) / 4,
        "prior/age_max": 3,
    }
    assert age_figures(buffer, 3, 1) == {
        "prior/usable_share": 12 / 20,
        "prior/age_mean": (2 + 2 + 0) / 3,
        "prior/age_max": 2,
    }
    assert age_figures(buffer, 9, 5) == {"prior/usable_share": 0.0}


# ---- in a run ----


def staleness_config(**changes):
    """Rounds at steps 50 and 150; each environment is asked at decisions 0 and 5 of its episodes of 10."""
    return small_config(**({"steps": 190, "vlm__max_staleness": 0} | changes))


def stored(trainer: Trainer) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(trainer.buffer.span_rows(*np.array(trainer.buffer.stream_bounds())[[0, 2]])["ids"])
    return trainer.buffer.extras(ids)


@pytest.mark.parametrize("between", ["mask", "hold"])
@pytest.mark.parametrize("limit", [0, 1, None])
def test_only_young_priors_guide(between, limit, tmp_path):
    trainer = Trainer(
        staleness_config(vlm__max_staleness=limit, vlm__between=between, vlm__every=7), tmp_path
    )
    ages: list[int] = []

    def watch(_rows):
        extras = stored(trainer)
        guiding = extras["prior_version"][extras["prior_mask"] > 0]
        ages.extend((trainer.prior.version - guiding).tolist())
        assert (guiding >= 0).all(), "a mask without a prior"
        young = trainer.prior.version - extras["prior_version"] <= (99 if limit is None else limit)
        assert torch.equal(extras["prior_mask"] > 0, young & (extras["prior_version"] >= 0))

    trainer.on_step(watch)
    trainer.run()
    assert trainer.prior.version == 2
    assert max(ages) == (2 if limit is None else limit)
    extras = stored(trainer)
    assert set(extras["prior_version"].tolist()) == {-1, 0, 1, 2}, "a masked prior keeps its version"
    # Asked at decisions 0, 7, 14, ...; episodes have 10.
    share = (extras["prior_version"] >= 0).float().mean()
    assert share == pytest.approx(1 / 7, abs=0.03) if between == "mask" else 0.5 < share < 0.9


def test_priors_in_the_step_that_a_publish_overtakes_do_not_guide(tmp_path):
    """The other batch of environments is simulating then, and is stored later."""
    trainer = Trainer(staleness_config(steps=60, covr__psi_0=42, vlm__every=1), tmp_path)
    late: list[float] = []

    def watch(rows):
        if trainer.step == 44:
            assert trainer.prior.version == 1, "the round was not published in this step"
        if trainer.step == 46:
            _, _, count = trainer.buffer.stream_bounds()
            newest = torch.from_numpy((count[rows.env_ids] - 1) * 4 + rows.env_ids)
            extras = trainer.buffer.extras(newest)
            assert (extras["prior_version"] == 0).all()
            late.extend(extras["prior_mask"].tolist())

    trainer.on_step(watch)
    trainer.run()
    assert late == [0, 0]


def test_a_refreshed_prior_guides_again(tmp_path):
    config = staleness_config(vlm__background=True, vlm__refresh_priors=True)
    trainer = Trainer(config, tmp_path)
    masked: list[int] = []

    def drain(_rows):
        extras = stored(trainer)
        masked.append(int(((extras["prior_mask"] == 0) & (extras["prior_version"] >= 0)).sum()))
        while trainer.step == trainer.config.steps and len(trainer.labeller):
            trainer.labeller.step()

    trainer.on_step(drain)
    trainer.run()
    extras = stored(trainer)
    assert max(masked) > 0, "nothing was ever too old"
    assert set(extras["prior_version"].tolist()) == {-1, 2}
    assert torch.equal(extras["prior_mask"], (extras["prior_version"] == 2).float())


def test_a_resumed_run_takes_another_limit(tmp_path):
    config = staleness_config(vlm__max_staleness=None)
    first = Trainer(config, tmp_path)
    run_until(first, 170)
    assert {0, 1, 2} == set(stored(first)["prior_version"][stored(first)["prior_mask"] > 0].tolist())
    config.vlm.max_staleness = 1
    second = Trainer(config, tmp_path, resume=True)
    extras = stored(second)
    assert set(extras["prior_version"][extras["prior_mask"] > 0].tolist()) == {1, 2}
    second.run()


def test_age_is_logged(tmp_path):
    Trainer(staleness_config(vlm__max_staleness=1, log_every=10), tmp_path).run()
    lines = [m for m in read_metrics(tmp_path) if "prior/usable_share" in m]
    assert len(lines) == 19
    assert lines[0]["prior/age_max"] == 0
    by_step = {m["step"]: m for m in lines}
    # Every fifth decision has a prior, and the first two of four environments have one more at first.
    assert by_step[140]["prior/usable_share"] == pytest.approx(0.2, abs=0.03)
    assert by_step[140]["prior/age_max"] == 1
    assert 0 < by_step[140]["prior/age_mean"] < 1
    assert by_step[190]["prior/age_max"] == 1, "older priors count as usable"
    assert by_step[190]["prior/usable_share"] < by_step[140]["prior/usable_share"]
