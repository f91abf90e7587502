"""covr-fast bench: what is timed has been checked."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from small_runs import FLAGS, call

from covr_fast.agents import SAC
from covr_fast.buffer import ReplayBuffer
from covr_fast.vlm import ActionPrior
from covr_fast.vlm.model.nano import write_nano


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


def sizes_shown(text: str) -> dict[str, int]:
    """vlm.image_size -> image tokens, from the rows of the table."""
    table = text.partition("tokens a frame")[2]
    return {size: int(tokens) for size, tokens in re.findall(r"│ (\d+)\S* *[a-z ]*│ +(\d+) │", table)}


def test_it_compares_sizes_of_what_the_vlm_sees(monkeypatch, capsys, tmp_path):
    assert bench(monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "answers for 2 frames of 48x48" in shown
    assert sizes_shown(shown) == {"0": 4, "112": 16}, "nano takes no more than 112x112"

    write_nano(tmp_path, seed=0)
    file = tmp_path / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    settings["size"]["longest_edge"] = 448 * 448
    file.write_text(json.dumps(settings))
    model = f"--vlm.model={tmp_path}"
    assert bench(monkeypatch, model, "--vlm.image-size=230") == 0
    table = {"0": 4, "112": 16, "168": 36, "224": 64, "230": 64, "336": 144, "448": 256}
    assert sizes_shown(capsys.readouterr().out) == table

    answer = ActionPrior._decode

    def small_gpu(self, *arguments):
        if self.image_size > 300:
            raise MemoryError("out of GPU memory")
        return answer(self, *arguments)

    monkeypatch.setattr(ActionPrior, "_decode", small_gpu)
    assert bench(monkeypatch, model) == 0
    assert sizes_shown(capsys.readouterr().out) == {"0": 4, "112": 16, "168": 36, "224": 64}


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
