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


def other_pixel(batch):
    batch.obs[0, 0, 0, 0] += 1
    return batch


@pytest.mark.parametrize(
    "owner, method, spoil, part",
    [
        (ReplayBuffer, "get", other_pixel, "replay"),
        (ActionPrior, "reference", lambda answer: SimpleNamespace(token_ids=answer.token_ids + 1), "prior"),
        (SAC, "update", lambda metrics: metrics | {"q": torch.tensor(torch.nan)}, "policy update"),
    ],
)
def test_there_are_no_figures_of_what_is_wrong(owner, method, spoil, part, monkeypatch, capsys):
    right = getattr(owner, method)
    monkeypatch.setattr(owner, method, lambda *given, **options: spoil(right(*given, **options)))
    assert bench(monkeypatch) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith(f"no figures, for something is wrong: {part}: ")
    assert "median" not in shown.out
