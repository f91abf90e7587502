"""The weights of the VLM after each round: none is lost, and none is kept that the run does not have."""

import itertools
import os
import signal
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_runs import at_each_step, call, roundless, run_until, run_until_killed, small_config
from test_full_disk import limited  # noqa: F401
from torch.testing import assert_close

from covr_fast import Trainer
from covr_fast import versions as module
from covr_fast.checkpoint import Checkpoint, newest_folder, replaced_folder
from covr_fast.errors import UserError
from covr_fast.rounds import Rounds
from covr_fast.versions import add_rounds, drop_staged, rounds_in, stage
from covr_fast.vlm import ActionPrior, VLMTuner


def rounds_config(**changes):
    """Rounds at steps 20, 60 and 120, if the episodes last so long."""
    return small_config(**({"steps": 130, "covr__psi_0": 20, "env__max_episode_steps": 4} | changes))


def remembered(trainer: Trainer) -> dict[int, dict[str, torch.Tensor]]:
    """Fills itself with the trained weights of each version, as they are served."""
    known: dict[int, dict[str, torch.Tensor]] = {}

    def remember(_rows):
        if trainer.prior.version not in known:
            weights = trainer.prior.backbone.model.state_dict()
            known[trainer.prior.version] = {name: value.clone() for name, value in weights.items()}

    at_each_step(trainer, remember)
    return known


def weights_in(folder) -> dict[str, torch.Tensor]:
    prior = ActionPrior.from_pretrained(folder, action_dim=2, device="cpu")
    return prior.backbone.model.state_dict()


def kept(run) -> dict[int, int]:
    """Number -> version."""
    return {each.number: each.version for each in rounds_in(run / "checkpoint" / "adapters")}


def lora(config):
    config.tuner = replace(config.tuner, mode="lora", lora_rank=4)
    return config


@pytest.mark.parametrize("every, mode", [(0, "full"), (0, "lora"), (30, "full"), (2, "lora")])
def test_all_rounds_are_kept_whenever_checkpoints_are_written(every, mode, tmp_path):
    config = rounds_config(checkpoint_every=every)
    trainer = Trainer(lora(config) if mode == "lora" else config, tmp_path)
    known = remembered(trainer)
    summary = trainer.run()
    assert kept(tmp_path) == {1: 1, 2: 2, 3: 3}
    assert [record["version"] for record in summary["rounds"]] == [1, 2, 3]
    adapters = tmp_path / "checkpoint" / "adapters"
    for version in (1, 2, 3):
        assert_close(weights_in(adapters / f"round-{version}"), known[version], rtol=0, atol=0)
    assert not (tmp_path / ".rounds").exists()
    name = "adapter_model.safetensors" if mode == "lora" else "model.safetensors"
    assert (adapters / "round-3" / name).samefile(tmp_path / "checkpoint" / "vlm" / name), "stored twice"


def test_earlier_rounds_are_carried_over_without_copying(tmp_path):
    trainer = Trainer(rounds_config(checkpoint_every=26), tmp_path)
    files: list[int] = []

    def watch(_rows):
        path = tmp_path / "checkpoint" / "adapters" / "round-1" / "model.safetensors"
        if trainer.step > 60:
            files.append(path.stat().st_ino)

    at_each_step(trainer, watch)
    trainer.run()
    files.append((tmp_path / "checkpoint/adapters/round-1/model.safetensors").stat().st_ino)
    assert len(files) > 30
    assert len(set(files)) == 1


def test_where_links_are_impossible_they_are_copied(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    trainer = Trainer(rounds_config(checkpoint_every=26), tmp_path)
    known = remembered(trainer)
    trainer.run()
    assert kept(tmp_path) == {1: 1, 2: 2, 3: 3}
    for version in (1, 3):
        folder = tmp_path / "checkpoint" / "adapters" / f"round-{version}"
        assert_close(weights_in(folder), known[version], rtol=0, atol=0)


def test_a_resumed_run_keeps_what_was_kept_and_goes_on(tmp_path):
    first = Trainer(rounds_config(), tmp_path)
    known = remembered(first)
    run_until(first, 80)
    assert kept(tmp_path) == {1: 1, 2: 2}
    second = Trainer(rounds_config(), tmp_path, resume=True)
    known |= remembered(second)
    later = remembered(second)
    second.run()
    assert kept(tmp_path) == {1: 1, 2: 2, 3: 3}
    adapters = tmp_path / "checkpoint" / "adapters"
    assert_close(weights_in(adapters / "round-1"), known[1], rtol=0, atol=0)
    assert_close(weights_in(adapters / "round-3"), later[3], rtol=0, atol=0)


def test_rounds_after_the_checkpoint_of_a_killed_run_are_those_of_the_resumed_one(tmp_path):
    config = rounds_config()
    first = Trainer(config, tmp_path)
    at_each_step(first, lambda _rows: first._saver._save(with_replay=True) if first.step == 40 else None)
    known = remembered(first)
    run_until_killed(first, 126)
    assert kept(tmp_path) == {1: 1}
    assert (tmp_path / ".rounds" / "round-2").is_dir(), "nothing is left behind, so the test tells nothing"
    config.tuner = replace(config.tuner, learning_rate=1e-4)
    run_until(Trainer(config, tmp_path, resume=True), 50)
    assert kept(tmp_path) == {1: 1}, "a round is kept that the resumed run has not done"
    second = Trainer(config, tmp_path, resume=True)
    later = remembered(second)
    second.run()
    assert kept(tmp_path) == {1: 1, 2: 2, 3: 3}
    for version, weights in (1, known[1]), (2, later[2]), (3, later[3]):
        folder = tmp_path / "checkpoint" / "adapters" / f"round-{version}"
        assert_close(weights_in(folder), weights, rtol=0, atol=0)
    assert not all(torch.equal(later[2][name], known[2][name]) for name in known[2])
    assert not (tmp_path / ".rounds").exists()


def test_rounds_of_a_checkpoint_whose_replacement_was_killed_are_carried_over(tmp_path):
    trainer = Trainer(rounds_config(), tmp_path)
    run_until(trainer, 80)
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    run_until(Trainer(rounds_config(), tmp_path, resume=True), 90)
    assert kept(tmp_path) == {1: 1, 2: 2}


def test_a_round_that_is_dropped_leaves_none(tmp_path):
    config = rounds_config(covr__publish_after=40)
    config.tuner = replace(config.tuner, overlap=True)
    trainer = Trainer(config, tmp_path)
    run_until(trainer, 40)  # the round of step 20 has begun, and is not published
    assert kept(tmp_path) == {}
    assert not (tmp_path / ".rounds").exists()


def test_an_error_right_after_publishing_mixes_no_rounds_up(tmp_path, monkeypatch):
    """The likelihood after a round is computed with new weights, for which a GPU may have no room."""
    trainer = Trainer(rounds_config(), tmp_path)
    known, likelihood = remembered(trainer), Rounds._best_log_prob

    def full(rounds, round_, when, log):
        if trainer.prior.version == 2:
            raise MemoryError("the GPU's memory is full")
        return likelihood(rounds, round_, when, log)

    monkeypatch.setattr(Rounds, "_best_log_prob", full)
    with pytest.raises(UserError, match="memory is full"):
        trainer.run()
    monkeypatch.undo()
    assert kept(tmp_path) == {1: 1, 2: 2}
    adapters = tmp_path / "checkpoint" / "adapters"
    assert_close(weights_in(adapters / "round-1"), known[1], rtol=0, atol=0)
    published = trainer.prior.backbone.model.state_dict()
    assert_close(weights_in(adapters / "round-2"), published, rtol=0, atol=0)
    summary = Trainer(rounds_config(), tmp_path, resume=True).run()
    assert [record["version"] for record in summary["rounds"]] == [1, 2, 3]


def test_a_round_without_samples_leaves_none(tmp_path, monkeypatch):
    start, number = VLMTuner.start, iter((1, 2, 3))

    def second_is_empty(tuner, *samples, **weights):
        if next(number) != 2:
            start(tuner, *samples, **weights)

    monkeypatch.setattr(VLMTuner, "start", second_is_empty)
    summary = Trainer(rounds_config(), tmp_path).run()
    assert kept(tmp_path) == {1: 1, 3: 2}
    assert [record.get("version") for record in summary["rounds"]] == [1, None, 2]
    numbers = [each.number for each in Checkpoint(tmp_path).rounds(rounds_config())]
    assert numbers == [0, 1, 3]


def test_a_disk_that_is_full_for_a_while(tmp_path, limited, capsys):  # noqa: F811
    """nano's weights, of 8 MB, cannot be written when the second round replaces those of the first."""
    trainer = Trainer(rounds_config(), tmp_path)

    def fill(_rows):
        limited(4_000_000 if 50 < trainer.step < 100 else -1)

    at_each_step(trainer, fill)
    assert trainer.run()["steps"] == 130
    said = " ".join(capsys.readouterr().out.split())
    assert "the weights of round 1 are not kept (" in said
    assert "File too large (os error 27)), and training goes on" in said
    assert kept(tmp_path) == {2: 2, 3: 3}
    assert not (tmp_path / ".rounds").exists()


def test_large_models_that_are_fully_tuned_are_not_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "LARGEST_FULL", 1_000_000)
    monkeypatch.setattr("covr_fast.saving.LARGEST_FULL", 1_000_000)
    trainer = Trainer(rounds_config(), tmp_path)
    trainer.run()
    said = capsys.readouterr().out
    assert said.count("only the newest weights of the VLM are kept: tuner.mode='full' makes more") == 1
    assert not (tmp_path / "checkpoint" / "adapters").exists()
    opened = Checkpoint(tmp_path).rounds(trainer.config)
    assert [(each.number, each.version) for each in opened] == [(0, 0), (3, 3)]
    assert opened[1].model == tmp_path / "checkpoint" / "vlm"
    assert call(monkeypatch, "evaluate", str(tmp_path), "--vlm-alone", "--round=2", "--episodes=1") == 2
    assert "after the rounds 0, 3 (0: before any)" in capsys.readouterr().err


def test_a_run_without_rounds_has_only_the_vlm_before_any(tmp_path):
    trainer = Trainer(roundless(steps=40), tmp_path)
    trainer.run()
    assert not (tmp_path / "checkpoint" / "adapters").exists()
    assert Checkpoint(tmp_path).rounds(trainer.config) == [(0, 0, "nano")]


def test_a_damaged_record_is_named(tmp_path):
    trainer = Trainer(rounds_config(steps=40), tmp_path)
    trainer.run()
    path = tmp_path / "checkpoint" / "adapters" / "round-1" / "round.json"
    for content in ('{"round": 1', '{"round": 1}', '{"round": "first", "version": 1}'):
        path.write_text(content)
        with pytest.raises(UserError, match=r"round-1/round.json is damaged .*: put back a copy"):
            Checkpoint(tmp_path).rounds(trainer.config)


class FakePrior:
    """Writes its number instead of weights."""

    backbone = SimpleNamespace(adapted=True)

    def __init__(self, number: int) -> None:
        self.number = number

    def save_pretrained(self, folder) -> None:
        folder.mkdir(parents=True)
        for name in ("a", "b"):
            (folder / name).write_text(str(self.number))


def newest_of(target: Path) -> Path | None:
    return newest_folder(target) if target.exists() or Path(f"{target}.old").exists() else None


def do_rounds(run: Path, records: list[dict[str, int]]) -> None:
    """Endless rounds after these, with a checkpoint after two of three."""
    target = run / "checkpoint"
    drop_staged(run)
    for number in itertools.count(len(records) + 1):
        if records:
            stage(run, records[-1], FakePrior(number - 1))
        records.append({"round": number, "version": number, "published": number})
        if number % 3:
            with replaced_folder(target) as new:
                FakePrior(number).save_pretrained(new / "vlm")
                add_rounds(new, run, newest_of(target), records, FakePrior(number))
            drop_staged(run)


def test_killed_anywhere(tmp_path):
    """Whatever is found afterwards has all rounds up to its last one, whole."""
    target, done = tmp_path / "checkpoint", 0
    records: list[dict[str, int]] = []
    for attempt in range(100):  # a little longer each time, however slow the disk is
        writer = os.fork()
        if writer == 0:
            with suppress(BaseException):
                do_rounds(tmp_path, records)
            os._exit(0)
        time.sleep(0.02 * attempt)
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        if (folder := newest_of(target)) is None:
            continue
        newest = int((folder / "vlm" / "a").read_text())
        found = rounds_in(folder / "adapters")
        assert [each.number for each in found] == list(range(1, newest + 1))
        for each in found:
            assert [(each.model / name).read_text() for name in ("a", "b")] == [str(each.number)] * 2
        assert newest >= done
        done = newest
        records = [{"round": n, "version": n, "published": n} for n in range(1, done + 1)]
        if done >= 8:
            return
    raise AssertionError("the rounds did not go on")
