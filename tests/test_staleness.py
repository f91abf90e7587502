"""Priors of old weights: which still guide, and what is logged of their age."""

import numpy as np
import pytest
import torch
from one_step_episodes import ENVS, SHAPE, make_buffer
from small_runs import at_each_step, run_until, small_config

from covr_fast import ReplayBuffer, Trainer
from covr_fast.report import read_metrics
from covr_fast.staleness import Trust, age_figures, mask_older, stored_priors

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


@pytest.mark.parametrize(
    "trust, oldest",  # while the versions 0, 1, 2, 3 and 5 serve
    [
        (Trust(), [0, 0, 0, 0, 0]),
        (Trust(max_staleness=2), [0, 0, 0, 1, 3]),
        (Trust(max_staleness=0), [0, 1, 2, 3, 5]),
        (Trust(first=2), [0, 0, 2, 2, 2]),
        (Trust(first=2, max_staleness=2), [0, 0, 2, 2, 3]),
        (Trust(first=3, max_staleness=1), [0, 0, 1, 3, 4]),
    ],
)
def test_what_guides_by_version(trust, oldest):
    assert [trust.oldest(version) for version in (0, 1, 2, 3, 5)] == oldest


def test_the_settings_of_a_run_say_what_is_trusted():
    config = small_config(covr__cold_start=4, vlm__max_staleness=3)
    assert Trust.of(config) == Trust(4, 3), "not the default of covr.trust_from"
    config.covr.trust_from = "start"
    assert Trust.of(config) == Trust(0, 3)


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
    assert age_figures(make_buffer(), 0, 0) == {"prior/usable_share": 0.0, "prior/masked_share": 0.0}


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
        "prior/masked_share": 0.0,
        "prior/age_mean": (3 + 2 + 2 + 0) / 4,
        "prior/age_max": 3,
    }
    assert age_figures(buffer, 3, 1) == {
        "prior/usable_share": 12 / 20,
        "prior/masked_share": 4 / 20,
        "prior/age_mean": (2 + 2 + 0) / 3,
        "prior/age_max": 2,
    }
    assert age_figures(buffer, 9, 5) == {"prior/usable_share": 0.0, "prior/masked_share": 16 / 20}


# ---- in a run ----


def staleness_config(**changes):
    """Rounds at steps 50 and 150; each environment is asked at decisions 0 and 5 of its episodes of 10."""
    return small_config(**({"steps": 190, "vlm__max_staleness": 0, "covr__trust_from": "start"} | changes))


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

    at_each_step(trainer, watch)
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

    at_each_step(trainer, watch)
    trainer.run()
    assert late == [0, 0]


def test_a_refreshed_prior_guides_again(tmp_path):
    config = staleness_config(vlm__background=True, vlm__refresh_priors=True)
    trainer = Trainer(config, tmp_path)
    masked: list[int] = []

    def drain(_rows):
        extras = stored(trainer)
        masked.append(int(((extras["prior_mask"] == 0) & (extras["prior_version"] >= 0)).sum()))
        while trainer.step == trainer.config.steps and len(trainer.vlm.labeller):
            trainer.vlm.labeller.step()

    at_each_step(trainer, drain)
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


# ---- priors that were given before the cold start's end ----


def trust_config(**changes):
    """Rounds at steps 20, 60 and 120; the second ends the cold start. Every second decision has a prior."""
    made = {
        "steps": 140, "covr__psi_0": 20, "covr__cold_start": 2, "env__max_episode_steps": 5, "vlm__every": 2
    }  # fmt: skip
    return small_config(**(made | changes))


def guiding_versions(trainer: Trainer) -> set[int]:
    extras = stored(trainer)
    assert not extras["prior_mask"][extras["prior_version"] < 0].any(), "a mask without a prior"
    return set(extras["prior_version"][extras["prior_mask"] > 0].tolist())


@pytest.mark.parametrize("between", ["mask", "hold"])
@pytest.mark.parametrize("trust_from, after", [("round", {2, 3}), ("start", {0, 1, 2, 3})])
def test_what_an_untrusted_vlm_said_does_not_guide_later(trust_from, after, between, tmp_path):
    trainer = Trainer(trust_config(covr__trust_from=trust_from, vlm__between=between), tmp_path)
    seen: list[tuple[bool, set[int]]] = []
    at_each_step(trainer, lambda _rows: seen.append((trainer.vlm.rounds.guiding, guiding_versions(trainer))))
    trainer.run()
    assert trainer.prior.version == 3
    assert set().union(*(versions for guiding, versions in seen if not guiding)) == {0, 1}
    assert set().union(*(versions for guiding, versions in seen if guiding)) == after
    assert guiding_versions(trainer) == after
    assert set(stored(trainer)["prior_version"].tolist()) == {-1, 0, 1, 2, 3}, "a prior lost its version"


def test_without_a_cold_start_every_prior_guides(tmp_path):
    trainer = Trainer(trust_config(covr__cold_start=0), tmp_path)
    assert trainer.vlm.rounds.guiding
    trainer.run()
    assert guiding_versions(trainer) == {0, 1, 2, 3}


@pytest.mark.parametrize("confidence", [False, True])
def test_a_background_answer_of_an_untrusted_vlm_does_not_guide(confidence, tmp_path):
    """All that were asked before the cold start's end and are answered after it."""
    trainer = Trainer(trust_config(vlm__background=True, covr__confidence=confidence), tmp_path)
    write, late = trainer.vlm.labeller._write, []

    def watched(ids, answer):
        count = write(ids, answer)
        if answer.version < 2 <= trainer.prior.version:
            late.extend(trainer.buffer.extras(ids)["prior_mask"].tolist())
        return count

    def hold_back(_rows):
        """Lets an answer arrive only when the cold start has ended."""
        labeller = trainer.vlm.labeller
        if labeller._asked is not None and 40 <= trainer.step < 62:
            _, answer = labeller._asked
            answer.result()
            labeller.step = lambda: 0
        elif trainer.step >= 62:
            labeller.__dict__.pop("step", None)

    trainer.vlm.labeller._write = watched
    at_each_step(trainer, hold_back)
    trainer.run()
    assert len(late) > 0, "no answer came late"
    assert not any(late)
    masks = stored(trainer)["prior_mask"]
    assert guiding_versions(trainer) <= {2, 3}
    assert masks.any()
    assert ((masks > 0) & (masks < 1)).any() == confidence


def test_a_refreshed_prior_is_one_of_a_trusted_vlm(tmp_path):
    trainer = Trainer(trust_config(vlm__background=True, vlm__refresh_priors=True), tmp_path)

    def drain(_rows):
        while trainer.step == trainer.config.steps and len(trainer.vlm.labeller):
            trainer.vlm.labeller.step()

    at_each_step(trainer, drain)
    trainer.run()
    extras = stored(trainer)
    assert set(extras["prior_version"].tolist()) == {-1, 3}
    assert torch.equal(extras["prior_mask"], (extras["prior_version"] == 3).float())


def test_what_was_masked_stays_masked_in_a_resumed_run(tmp_path):
    config = trust_config()
    run_until(Trainer(config, tmp_path), 100)
    config.covr.trust_from = "start"
    second = Trainer(config, tmp_path, resume=True)
    assert second.vlm.rounds.guiding
    assert guiding_versions(second) == {2}
    second.run()
    assert guiding_versions(second) == {2, 3}


def test_a_resumed_run_takes_another_trust(tmp_path):
    config = trust_config(covr__trust_from="start")
    run_until(Trainer(config, tmp_path), 100)
    config.covr.trust_from = "round"
    second = Trainer(config, tmp_path, resume=True)
    assert guiding_versions(second) == {2}
    config.covr.cold_start = 3
    third = Trainer(config, tmp_path, resume=True)
    assert not third.vlm.rounds.guiding
    third.run()
    assert guiding_versions(third) == {3}


def test_a_run_that_is_resumed_before_the_cold_starts_end_masks_at_its_end(tmp_path):
    config = trust_config()
    run_until(Trainer(config, tmp_path), 40)
    second = Trainer(config, tmp_path, resume=True)
    assert guiding_versions(second) == {0, 1}
    second.run()
    assert guiding_versions(second) == {2, 3}


def test_masked_priors_are_logged(tmp_path):
    Trainer(trust_config(log_every=10), tmp_path).run()
    by_step = {m["step"]: m for m in read_metrics(tmp_path) if "prior/usable_share" in m}
    assert by_step[50]["prior/masked_share"] == 0
    assert by_step[50]["prior/age_max"] == 1
    assert by_step[70]["prior/masked_share"] > by_step[70]["prior/usable_share"] > 0
    assert by_step[70]["prior/age_max"] == 0
    both = by_step[70]["prior/masked_share"] + by_step[70]["prior/usable_share"]
    assert both == pytest.approx(0.5, abs=0.03)
