"""A disk that is full: the run ends with one line, and its actor is kept."""

import os
import resource
import signal

import numpy as np
import pytest
from small_runs import at_each_step, roundless, run_until, small_config

import covr_fast.saving as module
from covr_fast import Trainer
from covr_fast.checkpoint import RESCUED, load_actor
from covr_fast.errors import UserError
from covr_fast.evaluate import actor_policy


@pytest.fixture
def limited():
    """No file of this process can become larger than so many bytes: writing more fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def plays_as(trainer, run):
    policy, config = load_actor(run)
    obs = np.random.default_rng(0).integers(0, 256, (3, *config.env.obs_shape), dtype=np.uint8)
    return (policy(obs) == actor_policy(trainer.agent, config)(obs)).all()


def test_no_room_for_the_last_checkpoint(tmp_path, limited):
    """nano's weights, of 8 MB, do not fit; the agent does, whose optimizers have filled meanwhile."""
    trainer = Trainer(roundless(steps=64), tmp_path)
    limited(4_000_000)
    said = r"checkpoint.* of step 64, only the agent was saved, as .*agent.pt"
    with pytest.raises(UserError, match=said) as caught:
        trainer.run()
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == set()
    assert plays_as(trainer, tmp_path)


def test_the_former_checkpoint_stays_and_the_newer_agent_is_beside_it(tmp_path, limited):
    config = roundless(steps=100, checkpoint_every=48)
    trainer = Trainer(config, tmp_path)

    def fill(_rows):
        if trainer.step == 60:
            limited(4_000_000)
        if trainer.step == 80:
            os.kill(os.getpid(), signal.SIGINT)

    at_each_step(trainer, fill)
    said = "of step 80, only the agent was saved.*goes on from the checkpoint before it"
    with pytest.raises(UserError, match=said):
        trainer.run()
    assert plays_as(trainer, tmp_path)
    limited(resource.RLIM_INFINITY)
    again = Trainer(config, tmp_path, resume=True)
    assert again.step == 48
    again.run()
    assert not (tmp_path / RESCUED).exists(), "an agent older than the checkpoint is left"
    assert plays_as(again, tmp_path)


def test_a_regular_checkpoint_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    trainer = Trainer(roundless(steps=100, checkpoint_every=40), tmp_path)
    save, calls = module.save_checkpoint, []

    def full_once(*arguments):
        calls.append(trainer.step)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", "replay")
        save(*arguments)

    monkeypatch.setattr(module, "save_checkpoint", full_once)
    assert trainer.run()["steps"] == 100
    said = " ".join(capsys.readouterr().out.split())
    assert "no checkpoint at step 80 (replay: No space left on device): the one before it stays" in said
    assert calls == [40, 80, 100]


def test_no_room_for_metrics(tmp_path, limited, capfd, monkeypatch):
    """The run is saved, to be resumed, and TensorBoard's thread adds nothing to the line."""
    trainer = Trainer(small_config(steps=4000, covr__psi_0=10_000, log_every=8), tmp_path)

    def fill(_rows):
        limited((tmp_path / "metrics.jsonl").stat().st_size + 100)

    save = module.save_checkpoint

    def room_again(*arguments):
        limited(resource.RLIM_INFINITY)
        save(*arguments)

    at_each_step(trainer, fill)
    monkeypatch.setattr(module, "save_checkpoint", room_again)
    with pytest.raises(UserError, match=r"metrics.jsonl: File too large"):
        trainer.run()
    assert "Traceback" not in capfd.readouterr().err
    assert Trainer(small_config(steps=4000, covr__psi_0=10_000), tmp_path, resume=True).step == 8


@pytest.mark.parametrize(
    "name, consequence", [("curves.png", "draws it again"), ("episode.gif", "but for this video")]
)
def test_no_room_for_pictures(name, consequence, tmp_path, monkeypatch):
    trainer = Trainer(roundless(steps=48, video=name != "curves.png"), tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    target = "matplotlib.figure.Figure.savefig" if name == "curves.png" else "imageio.v2.get_writer"
    monkeypatch.setattr(target, full)
    said = f"{name}: No space left on device: the run is finished.*{consequence}"
    with pytest.raises(UserError, match=said):
        trainer.run()
    assert (tmp_path / "summary.json").exists()
    assert not list(tmp_path.glob(f"{name}*"))


def test_no_room_at_the_start(tmp_path, limited):
    trainer = Trainer(small_config(), tmp_path / "run")
    limited(1 << 20)
    with pytest.raises(UserError, match=r"\.reserve: File too large"):
        trainer.run()


def test_an_interrupt_while_saving_waits_for_it(tmp_path, monkeypatch):
    trainer = Trainer(roundless(steps=100), tmp_path)
    save = module.save_checkpoint

    def interrupted_amid(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        save(*arguments)

    monkeypatch.setattr(module, "save_checkpoint", interrupted_amid)
    run_until(trainer, 60)
    assert Trainer(roundless(steps=100), tmp_path, resume=True).step == 60
