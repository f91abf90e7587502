"""The whole loop on real CarRacing frames and the real nano VLM, at a small size."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from small_runs import at_each_step, roundless, run_until, run_until_killed, small_config
from torch._dynamo.utils import counters
from torch.testing import assert_close

from covr_fast import TrainConfig, Trainer
from covr_fast.checkpoint import load_actor
from covr_fast.envs import PixelEnvs
from covr_fast.errors import UserError
from covr_fast.evaluate import actor_policy
from covr_fast.machine import device_name
from covr_fast.report import read_metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    trainer = Trainer(small_config(), out)
    guided: list[tuple[int, bool]] = []
    update = trainer.agent.update

    def watched(batch, *, guide):
        guided.append((trainer.vlm.rounds.schedule.rounds, guide))
        return update(batch, guide=guide)

    trainer.agent.update = watched
    summary = trainer.run()
    return trainer, summary, out, guided


def test_counts_add_up(finished):
    trainer, summary, _, guided = finished
    assert summary["steps"] == 160
    assert len(trainer.buffer) > 0
    assert summary["updates"] == (160 - 32) // 8 == len(guided)
    assert summary["episodes"] == 160 // 10
    assert summary["frames"] == summary["decisions"] == 160
    assert summary["machine"] == device_name("cpu")
    assert {"covr-fast", "python", "torch", "envpool"} <= summary["versions"].keys()
    assert sum(summary["time_shares"].values()) == pytest.approx(1, abs=1e-6)


def test_rounds_happen_on_schedule_from_finished_episodes_only(finished):
    _, summary, *_ = finished
    # Episodes last 10 decisions of 4 environments, so 40 samples finish at once, up to a batch of 2.
    assert [r["step"] for r in summary["rounds"]] == [50, 150]
    assert summary["rounds"][0]["samples"] == 40
    for r in summary["rounds"]:
        assert 0 < r["kept"] < r["samples"]
        assert 0 < r["nonzero_share"] <= 1
        assert math.isfinite(r["loss_after"])


def test_cold_start(finished):
    *_, guided = finished
    assert {guide for rounds, guide in guided if rounds < 1} == {False}
    assert {guide for rounds, guide in guided if rounds >= 1} == {True}


def test_only_asked_transitions_carry_a_prior(finished):
    trainer, *_ = finished
    batch = trainer.buffer.sample(2000)
    asked = batch.extras["prior_mask"].bool()
    assert 0.1 < asked.float().mean() < 0.3  # every fifth
    assert (batch.extras["prior"][asked].abs() <= 1).all()


@pytest.mark.parametrize("motion", [True, False])
def test_the_vlm_is_tuned_on_the_images_that_it_is_asked_about(motion, tmp_path, monkeypatch):
    trainer = Trainer(small_config(steps=60, vlm__motion=motion, vlm__every=1), tmp_path)
    asked: list[torch.Tensor] = []
    tuned: list[torch.Tensor] = []
    call, start = type(trainer.prior).__call__, trainer.vlm.tuner.start

    def watched(prior, images, **options):
        asked.extend(images.clone())
        return call(prior, images, **options)

    def watched_start(frames, *others, **weights):
        tuned.extend(frames)
        start(frames, *others, **weights)

    monkeypatch.setattr(type(trainer.prior), "__call__", watched)
    monkeypatch.setattr(trainer.vlm.tuner, "start", watched_start)
    trainer.run()
    known = {image.numpy().tobytes() for image in asked}
    assert tuned
    assert all(frame.numpy().tobytes() in known for frame in tuned)
    coloured = [bool((frame[0] != frame[2]).any()) for frame in tuned]
    assert any(coloured) == motion  # only motion makes a grey image coloured


def test_run_folder(finished):
    _, summary, out, _ = finished
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "metrics.jsonl", "summary.json", "curves.png", "checkpoint"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert TrainConfig.from_dict(json.loads((out / "config.json").read_text())) == small_config()
    metrics = read_metrics(out)
    assert [m["step"] for m in metrics if "q" in m][-1] == 160
    assert all(math.isfinite(v) for m in metrics for v in m.values())


def test_the_checkpoint_plays_like_the_trained_actor(finished):
    from covr_fast.vlm import ActionPrior

    trainer, _, out, _ = finished
    policy, config = load_actor(out)
    obs = np.random.default_rng(0).integers(0, 256, (3, *trainer.envs.obs_shape), dtype=np.uint8)
    assert (policy(obs) == actor_policy(trainer.agent, config)(obs)).all()
    frames = torch.from_numpy(obs[:, -3:])
    prior = ActionPrior.from_pretrained(out / "checkpoint" / "vlm", action_dim=2)
    assert (prior(frames).token_ids == trainer.prior(frames).token_ids).all()


def test_same_seed_same_run_bit_for_bit(finished, tmp_path):
    first, _, out, _ = finished
    second = Trainer(small_config(), tmp_path)
    second.run()
    for name, module in first.agent.modules().items():
        assert_close(module.state_dict(), second.agent.modules()[name].state_dict(), rtol=0, atol=0)
    assert first.counters.returns == second.counters.returns

    def timeless(metrics):
        skip = ("time/", "steps_per_second", "seconds", "round/tuning_seconds")
        return [{k: v for k, v in m.items() if not k.startswith(skip)} for m in metrics]

    assert timeless(read_metrics(out)) == timeless(read_metrics(tmp_path))


def test_another_seed_another_run(finished, tmp_path):
    first, *_ = finished
    other = Trainer(roundless(seed=1, steps=56), tmp_path)
    other.run()
    assert other.counters.returns[:4] != first.counters.returns[:4]


def test_the_seed_of_the_run_is_that_of_the_tuner_unless_it_has_its_own(tmp_path):
    def adapters(seed: int, own: int | None) -> list[torch.Tensor]:
        config = roundless(seed=seed)
        config.tuner = replace(config.tuner, mode="lora", lora_rank=2, seed=own)
        trainer = Trainer(config, tmp_path / f"{seed}-{own}")
        assert trainer.vlm.tuner.seed == (seed if own is None else own)
        assert trainer.config.to_dict()["tuner"]["seed"] == own
        return [p for p in trainer.prior.backbone.model.parameters() if p.requires_grad and p.any()]

    differ = [not torch.equal(a, b) for a, b in zip(adapters(0, None), adapters(1, None), strict=True)]
    assert differ
    assert all(differ)
    assert all(torch.equal(a, b) for a, b in zip(adapters(0, 7), adapters(1, 7), strict=True))


def test_callbacks_see_every_step_when_it_is_done(tmp_path):
    trainer = Trainer(small_config(steps=60), tmp_path)
    seen, order = [], []

    def see(rows):
        seen.append((rows, trainer.step, len(trainer.vlm.rounds.records)))

    at_each_step(trainer, see)
    at_each_step(trainer, lambda rows: order.append(rows is seen[-1][0]))
    trainer.run()
    assert [step for _, step, _ in seen] == list(range(2, 61, 2))
    assert order == [True] * 30
    assert next(step for _, step, rounds in seen if rounds) == 50, "a step's round comes before its callback"
    assert [rows.env_ids.tolist() for rows, *_ in seen[:3]] == [[0, 1], [2, 3], [0, 1]]
    rewards = np.concatenate([rows.reward for rows, *_ in seen])
    assert np.array_equal(trainer.buffer.get(np.arange(60), n_step=1).reward.numpy(), rewards)


def test_a_round_waits_for_finished_episodes_and_says_so(tmp_path, capsys):
    trainer = Trainer(small_config(steps=60, covr__psi_0=16, covr__min_samples=30), tmp_path)
    summary = trainer.run()
    assert summary["rounds"][0]["step"] >= 40
    assert "round 1 waits: D_f holds 0 samples" in capsys.readouterr().out


def test_held_priors_cover_the_steps_between_and_end_with_the_episode(tmp_path):
    trainer = Trainer(roundless(steps=60, vlm__between="hold", vlm__every=7), tmp_path)
    trainer.run()
    batch = trainer.buffer.sample(500)
    share = batch.extras["prior_mask"].mean()
    # Asked at decisions 0, 7, 14; episodes end at 10: 10 of the first 10 are covered, then 14 is the next.
    assert 0.5 < share < 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"replay__batch_size": 500}, "replay.batch_size=500 is larger than what is stored"),
        ({"replay__gamma": 1.5}, "replay.gamma=1.5"),
        ({"replay__pad": 24}, "replay.pad=24 crops away all"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"vlm__decimals": 0}, "vlm.decimals=0 must be at least 1"),
        ({"vlm__temperature": -1.0}, "vlm.temperature=-1.0 must not be negative"),
        ({"agent__lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"warmup": 8, "replay__batch_size": 8}, "warmup=8 steps of env.action_repeat=1 over env.num_envs=4"),
        ({"env__frame_stack": 2}, "vlm.motion shows three frames"),
        ({"vlm__model": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"env__id": "CarRacer-v3"}, "did you mean CarRacing-v3"),
        ({"steps": "100"}, "steps='100' must be int"),
        ({"save_replay": 1}, "save_replay=1 must be bool"),
        ({"replay__gamma": True}, "replay.gamma=True must be float"),
        ({"vlm__between": "hodl"}, "vlm.between='hodl' must be 'mask' or 'hold'"),
        ({"agent__channels": (8, "8")}, r"agent.channels=\(8, '8'\) must be tuple"),
        ({"covr__horizon": 3.5}, "covr.horizon=3.5 must be int"),
        ({"vlm__background": True, "vlm__between": "hold"}, "vlm.between='hold' needs the answer"),
        ({"vlm__refresh_priors": True}, "set vlm.background too"),
        ({"covr__publish_after": 5}, "set tuner.overlap too"),
        ({"vlm__max_staleness": -1}, "vlm.max_staleness=-1 must not be negative"),
    ],
)
def test_bad_settings_are_one_line_errors(changes, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        Trainer(small_config(**changes), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists(), "something half-written was left behind"


def test_an_interrupted_run_is_saved_and_continues(tmp_path):
    config = small_config(steps=100, covr__psi_0=50)
    first = Trainer(config, tmp_path)
    run_until(first, 60)
    assert first.step == 60
    assert not (tmp_path / "summary.json").exists()

    second = Trainer(config, tmp_path, resume=True)
    assert second.step == 60
    assert len(second.buffer) == len(first.buffer)
    assert second.counters == first.counters
    assert second.vlm.rounds.schedule.rounds == first.vlm.rounds.schedule.rounds == 1
    # The unfinished episodes were cut, so all that D_f held back is finished now.
    assert len(second.vlm.rounds.finished) == 60 - 40
    assert_close(first.agent.state_dict(), second.agent.state_dict(), rtol=0, atol=0)
    earlier = second.clock.total
    summary = second.run()
    before = first.evaluations.before["random"].returns.tolist()
    assert summary["evaluations"]["random"]["returns"] == before, "what was before training changed"
    assert 0 < earlier < summary["seconds"]
    # Whatever a figure is per second of, the seconds are those of the whole run.
    assert summary["steps_per_second"] == pytest.approx(100 / summary["seconds"])
    assert summary["machine"] == device_name("cpu")
    assert {"covr-fast", "python", "torch", "envpool"} <= summary["versions"].keys()
    assert sum(summary["time_shares"].values()) == pytest.approx(1, abs=1e-6)
    assert second.clock.seconds["simulation"] > first.clock.seconds["simulation"]
    assert summary["steps"] == 100
    assert summary["updates"] == (100 - 32) // 8
    steps = [m["step"] for m in read_metrics(tmp_path)]
    assert steps == sorted(steps)


def test_a_run_is_resumed_with_and_without_compiling(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # traces, in a second
    config = roundless(steps=120)
    for begun, step, compile in ((0, 56, True), (56, 88, False), (88, 112, True)):
        torch._dynamo.reset()
        counters.clear()
        config.agent.compile = compile
        trainer = Trainer(config, tmp_path, resume=begun > 0)
        assert trainer.step == begun
        run_until(trainer, step)
        assert (counters["stats"]["unique_graphs"] > 0) == compile
    policy, opened = load_actor(tmp_path)
    assert opened.agent.compile
    obs = torch.randint(0, 256, (2, *trainer.envs.obs_shape), dtype=torch.uint8).numpy()
    assert (policy(obs) == actor_policy(trainer.agent, config)(obs)).all()


def test_a_resumed_run_forgets_what_was_logged_after_its_checkpoint(tmp_path):
    config = roundless(steps=90, checkpoint_every=64, log_every=10)
    run_until_killed(Trainer(config, tmp_path), 80)
    assert read_metrics(tmp_path)[-1]["step"] >= 80
    second = Trainer(config, tmp_path, resume=True)
    assert second.step == 64
    second.run()
    steps = [m["step"] for m in read_metrics(tmp_path) if "updates" in m]
    assert steps == sorted(set(steps))


def test_sampled_priors_depend_on_the_seed_alone(tmp_path):
    priors = []
    for name in ("a", "b"):
        config = roundless(steps=40, vlm__temperature=1.0)
        trainer = Trainer(config, tmp_path / name)
        torch.manual_seed(len(priors))  # nobody else's randomness enters
        trainer.run()
        priors.append(trainer.buffer.sample(200).extras["prior"])
    assert torch.equal(*priors)


def test_returns_of_truncated_episodes_can_be_bootstrapped(tmp_path):
    plain = Trainer(roundless(steps=56), tmp_path / "plain")
    plain.run()
    longer = Trainer(roundless(steps=56, covr__bootstrap=True), tmp_path / "longer")
    longer.run()
    ids = longer.vlm.rounds.finished.indices
    assert torch.equal(ids, plain.vlm.rounds.finished.indices)
    # All episodes were truncated after 10 decisions.
    time = longer.vlm.rounds.finished.time_in_episode
    value = longer.vlm.rounds.finished.bootstrap(ids[time == 9])
    gain = longer.vlm.rounds.finished.returns - plain.vlm.rounds.finished.returns
    expected = value.repeat_interleave(10) * longer.config.replay.gamma ** (10 - time)
    assert_close(gain, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("when", ["measure_before", "measure_after"])
def test_an_interrupt_outside_the_loop_loses_nothing(when, tmp_path, monkeypatch):
    config = roundless(steps=48)
    first = Trainer(config, tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(first.evaluations, when, interrupt)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = Trainer(config, tmp_path, resume=True)
    assert second.step == (0 if when == "measure_before" else 48)
    summary = second.run()
    assert summary["steps"] == 48
    assert summary["evaluations"].keys() == {"random", "actor"}
    measured = [name for m in read_metrics(tmp_path) for name in m if name == "eval/random_mean"]
    assert len(measured) == 1, "what was measured before training was measured again"


def test_a_diverged_run_says_so_and_keeps_its_last_checkpoint(tmp_path):
    trainer = Trainer(roundless(steps=100, checkpoint_every=48), tmp_path)

    def diverging(_rows):
        if trainer.step > 60:
            for parameter in trainer.agent.actor.parameters():
                parameter.data.fill_(torch.nan)

    at_each_step(trainer, diverging)
    with pytest.raises(UserError, match=r"actions are NaN at step \d+: training diverged; lower agent.lr"):
        trainer.run()
    kept = Trainer(small_config(), tmp_path, resume=True)
    assert kept.step == 48
    assert all(torch.isfinite(p).all() for p in kept.agent.actor.parameters())


def test_steps_lost_to_a_small_replay_are_said(tmp_path, capsys):
    trainer = Trainer(small_config(steps=60, replay__capacity=40, covr__min_samples=30), tmp_path)
    summary = trainer.run()
    lost = int(summary["rounds"][0]["overwritten"])
    assert lost > 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"round 1: {lost} steps were overwritten in the replay buffer before D_f was read" in said
    assert "raise replay.capacity=40" in said


def test_no_seed_is_too_large_for_the_simulator(tmp_path):
    Trainer(small_config(seed=2**33), tmp_path)


def test_environments_are_closed_if_the_rest_cannot_be_built(tmp_path, monkeypatch):
    closed = []
    close = PixelEnvs.close
    monkeypatch.setattr(PixelEnvs, "close", lambda envs: (closed.append(envs), close(envs)))
    with pytest.raises((UserError, OSError)):
        Trainer(small_config(vlm__model=str(tmp_path / "nothing")), tmp_path / "run")
    assert len(closed) == 1
