"""covr-fast report: what it prints and writes, of real runs and of many."""

import json
import shutil
import sys

import pytest
from page_text import Page
from small_runs import call, roundless, small_config
from written_runs import write_run

from covr_fast import Trainer


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A tiny run with a round, one without, and one that was interrupted."""
    folder = tmp_path_factory.mktemp("real")
    Trainer(small_config(eval__vlm=True, eval__every=80, video=True), folder / "covr").run()
    Trainer(roundless(seed=1), folder / "no-round").run()
    Trainer(roundless(seed=2), folder / "ended").run()
    (folder / "ended/summary.json").unlink()
    return folder


def test_real_runs(real, monkeypatch, capsys, tmp_path):
    (real / "covr/curves.png").unlink()
    out = tmp_path / "page.html"
    assert call(monkeypatch, "report", str(real), "--out", str(out)) == 0
    said = capsys.readouterr().out
    assert "runs compared: mean episode returns" in said
    assert f"{real / 'ended'} is left out of all figures: it is not finished (160 steps so far)" in said
    assert f"page: {out} (" in said
    assert (real / "covr/curves.png").is_file()
    shown = Page(out.read_text())
    summary = json.loads((real / "covr/summary.json").read_text())
    rows = {row[0]: row for row in shown.tables["runs"][0]}
    for name, cell in (("actor", 3), ("vlm_before", 4), ("vlm_after", 5), ("random", 6)):
        mean = rows[str(real / "covr")][cell].split(" ± ")[0].replace("\N{MINUS SIGN}", "-")
        assert float(mean) == pytest.approx(summary["evaluations"][name]["mean"], rel=0.02, abs=0.02)
    assert rows[str(real / "covr")][8] == str(len(summary["rounds"])) != "0"
    assert shown.values("video", "src") or shown.values("img", "src")
    assert "policy update" in shown.texts["speed"]


def test_many_runs_are_a_line_each(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for seed in range(5):
        write_run(tmp_path / f"sweep/a{seed}", 10 + seed, seed=seed)
    assert call(monkeypatch, "report", "sweep") == 0
    said = capsys.readouterr().out
    assert "fine-tuning rounds of the VLM" not in said
    assert "12.0 ± 1.4" in said
    assert "drawn: curves.png in 5 run folders" in said
    assert (tmp_path / "report.html").is_file()


def test_a_path_that_is_given_twice_is_one_run(monkeypatch, capsys, tmp_path):
    run = write_run(tmp_path / "a", 10)
    assert call(monkeypatch, "report", str(run), str(run), "--out", str(tmp_path / "o.html")) == 0
    assert "runs compared" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "out, message", [("", "is a folder: name a file"), ("none/a.html", "there is no folder")]
)
def test_a_place_that_cannot_be_written_is_told_first(out, message, monkeypatch, capsys, tmp_path):
    run = write_run(tmp_path / "a", 10)
    assert call(monkeypatch, "report", str(run), "--out", str(tmp_path / out)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (run / "curves.png").exists()


@pytest.mark.parametrize("package", ["rliable", "matplotlib"])
def test_a_missing_package_is_named_with_the_remedy(package, monkeypatch, capsys, tmp_path):
    run = write_run(tmp_path / "a", 10)
    for name in [name for name in sys.modules if name.startswith((package, "covr_fast.reporting."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    assert call(monkeypatch, "report", str(run), "--out", str(tmp_path / "o.html")) == 2
    assert f"{package} is not installed: pip install 'covr-fast[train]'" in capsys.readouterr().err
    assert not (tmp_path / "o.html").exists()


def test_seeds_that_count_twice_are_an_error(monkeypatch, capsys, tmp_path):
    shutil.copytree(write_run(tmp_path / "a", 10), tmp_path / "b")
    assert call(monkeypatch, "report", str(tmp_path), "--out", str(tmp_path / "o.html")) == 2
    assert "a seed counts once" in capsys.readouterr().err


def test_few_runs_have_a_line_for_each_group(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    for seed, final in enumerate((10, 14)):
        write_run(tmp_path / f"off{seed}", final, seed=seed, method="off")
    write_run(tmp_path / "dpl", 40, method="dpl", agent__prior_weight=0.125, covr__decay=0.5)
    assert call(monkeypatch, "report", str(tmp_path), "--out", str(tmp_path / "o.html")) == 0
    said = capsys.readouterr().out.partition("runs compared: mean episode returns")[2]
    (off,) = (line for line in said.splitlines() if "fast · off" in line)
    assert "2 seeds" in off
    assert "12.0 ± 2.0" in off
    (dpl,) = (line for line in said.splitlines() if "fast · dpl" in line)
    assert "1 seed " in dpl
    assert "±" not in dpl
    assert "21.3" not in said, "no mean over methods"
    assert "…" not in said, "nothing that tells runs apart is cut off"


def test_returns_of_any_size(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "120")
    run = write_run(tmp_path / "a", 0.0312, random=0.0021, episodes=1, steps=40)
    write_run(tmp_path / "b", 0.0332, seed=1, random=0.0021, episodes=1, steps=40)
    out = tmp_path / "o.html"
    assert call(monkeypatch, "report", str(run), str(tmp_path / "b"), "--out", str(out)) == 0
    said = capsys.readouterr().out
    summary, _, compared = said.partition("runs compared")
    assert "0.0021" in summary  # fewer digits would make it 0
    assert "0.032 ± 0.001" in compared
    rows = Page(out.read_text()).tables["runs"][0]
    assert rows[1][3] == "0.031"  # of one episode, without a deviation
    assert rows[1][6] == "0.0021"


def axes_of(run, monkeypatch):
    """The panels of curves.png: returns, losses of rounds, Q and entropy (left and right), time."""
    from matplotlib import pyplot

    from covr_fast.report import plot_curves

    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    plot_curves(run)
    monkeypatch.undo()
    panels = {axes.get_title(): axes for axes in drawn[0].axes}
    pyplot.close(drawn[0])
    return panels


def words_in(axes):
    return [text.get_text() for text in axes.texts]


def test_the_curves_of_a_run_that_logged_nothing(monkeypatch, tmp_path):
    run = write_run(tmp_path / "a", 10)
    lines = [{"step": 0, "eval/random_mean": 0.02}, {"step": 600, "eval/actor_mean": 10.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    panels = axes_of(run, monkeypatch)
    returns = panels["episode return"]
    assert returns.get_xlim() == (0, 600)
    assert words_in(returns) == []
    legend = [text.get_text() for text in returns.get_legend().get_texts()]
    assert legend == ["random policy: 0.020", "actor alone, trained: 10"]
    for title in ("VLM loss on held-out kept samples", "mean Q and policy entropy", "where the time went"):
        assert words_in(panels[title]) == ["nothing logged"]
        assert panels[title].get_legend() is None


def test_the_curves_of_a_run_with_rounds(monkeypatch, tmp_path):
    run = write_run(tmp_path / "a", 10)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "episode_return" not in line or line["step"] == 3000]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    panels = axes_of(run, monkeypatch)
    losses = panels["VLM loss on held-out kept samples"]
    before, after = (patch.get_facecolor() for patch in losses.get_legend().get_patches())
    assert before != after
    assert [bar.get_facecolor() for bar in losses.patches] == [before] * 2 + [after] * 2
    (trained, *_) = panels["episode return"].lines
    assert trained.get_marker() == "o", "a line through one point is not seen"
