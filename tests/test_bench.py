"""covr-fast bench: what is timed has been checked."""

from types import SimpleNamespace

import pytest
import torch
from small_runs import FLAGS, call

from covr_fast.agents import SAC
from covr_fast.buffer import ReplayBuffer
from covr_fast.vlm import ActionPrior


def bench(monkeypatch, *arguments: str) -> int:
    return call(monkeypatch, "bench", "carracing", "--seconds", "0.05", *FLAGS, *arguments)


def test_it_times_every_part_and_writes_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert bench(monkeypatch) == 0
    shown = capsys.readouterr().out
    for part in ("simulation", "replay", "prior", "policy update"):
        assert part in shown
    assert "2 of 2 answers as by transformers' generate()" in shown
    assert not list(tmp_path.iterdir())


def test_it_knows_presets_and_fields(monkeypatch, capsys):
    assert call(monkeypatch, "bench", "carracng") == 2
    assert "did you mean carracing" in capsys.readouterr().err
    assert bench(monkeypatch, "--replay.batch-size", "5000") == 2
    assert "replay.batch_size=5000" in capsys.readouterr().err


def spoil_replay(patch):
    get = ReplayBuffer.get

    def wrong(self, index, **options):
        batch = get(self, index, **options)
        batch.obs[0, 0, 0, 0] += 1
        return batch

    patch.setattr(ReplayBuffer, "get", wrong)


def spoil_prior(patch):
    reference = ActionPrior.reference

    def wrong(self, images):
        answer = reference(self, images)
        return SimpleNamespace(token_ids=answer.token_ids + 1)

    patch.setattr(ActionPrior, "reference", wrong)


def spoil_update(patch):
    update = SAC.update

    def wrong(self, batch, *, guide):
        return update(self, batch, guide=guide) | {"q": torch.tensor(torch.nan)}

    patch.setattr(SAC, "update", wrong)


@pytest.mark.parametrize(
    "spoil, part", [(spoil_replay, "replay"), (spoil_prior, "prior"), (spoil_update, "policy update")]
)
def test_there_are_no_figures_of_what_is_wrong(spoil, part, monkeypatch, capsys):
    spoil(monkeypatch)
    assert bench(monkeypatch) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith(f"no figures, for something is wrong: {part}: ")
    assert "median" not in shown.out
