"""What a power cut or a careless hand leaves of a run folder: one line that names the file and the remedy."""

import json
import shutil

import pytest
from small_runs import call, roundless, run_until

from covr_fast import Trainer
from covr_fast.checkpoint import load_actor, load_config
from covr_fast.errors import UserError
from covr_fast.files import read_records, write_whole
from covr_fast.report import read_metrics, read_summary


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    run_until(Trainer(roundless(steps=120, log_every=8), out), 56)
    return out


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def tear(path, keep):
    content = path.read_bytes().rstrip()
    path.write_bytes(content[: int(len(content) * keep)])


@pytest.mark.parametrize("tail", ["", '{"step": 48, "loss', "\0\0\0\0"])
def test_a_torn_last_line_of_the_metrics_is_dropped_and_said(tail, run, capsys):
    path = run / "metrics.jsonl"
    before = read_metrics(run)
    with path.open("a") as file:
        file.write(tail)
    assert read_records(path) == (before, bool(tail))
    Trainer(load_config(run), run, resume=True).run()
    assert ("its last line was torn" in capsys.readouterr().out) == bool(tail)
    assert read_metrics(run)[: len(before)] == before
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()][-1] == 120


def test_report_leaves_a_torn_line_out(run, monkeypatch, capsys):
    Trainer(load_config(run), run, resume=True).run()
    tear(run / "metrics.jsonl", 0.99)
    assert call(monkeypatch, "report", str(run), "--out", str(run.parent / "report.html")) == 0
    assert "metrics.jsonl: its last line is torn and was left out" in capsys.readouterr().out


def test_damage_within_the_metrics_is_told_before_anything_is_written(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1][:9] + "\n", *lines[2:]]))
    before = (run / "config.json").stat().st_mtime_ns
    for use in (lambda: Trainer(load_config(run), run, resume=True), lambda: read_metrics(run)):
        with pytest.raises(UserError, match=r"metrics.jsonl is damaged in line 2: remove that line"):
            use()
    assert (run / "config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("keep", [0, 0.5, 0.999])
@pytest.mark.parametrize(
    "name, action",
    [
        ("checkpoint/agent.pt", "evaluate"),
        ("checkpoint/agent.pt", "resume"),
        ("checkpoint/counters.pt", "resume"),
        ("checkpoint/replay", "resume"),
        ("checkpoint/vlm/model.safetensors", "resume"),
        ("checkpoint/vlm/config.json", "resume"),
        ("checkpoint/vlm/tokenizer.json", "resume"),
        ("checkpoint/vlm/action_prior.json", "resume"),
        ("config.json", "evaluate"),
        ("config.json", "resume"),
    ],
)
def test_truncated_files(name, action, keep, run, monkeypatch, capsys):
    tear(run / name, keep)
    arguments = ["evaluate"] if action == "evaluate" else ["train", "carracing", "--resume"]
    assert call(monkeypatch, *arguments, str(run)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert str(run / name if "vlm" not in name else run / "checkpoint" / "vlm") in error


@pytest.mark.parametrize("name", ["agent.pt", "counters.pt", "vlm"])
def test_missing_parts_of_a_checkpoint(name, run, monkeypatch, capsys):
    path = run / "checkpoint" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert call(monkeypatch, "train", "carracing", "--resume", str(run)) == 2
    assert str(path) in capsys.readouterr().err


def test_a_changed_byte_is_found(run):
    path = run / "checkpoint" / "agent.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"agent.pt is damaged .*does not match its checksum"):
        load_actor(run)


def test_another_file_in_the_place_of_one(run):
    shutil.copy(run / "checkpoint" / "counters.pt", run / "checkpoint" / "agent.pt")
    with pytest.raises(UserError, match=r"agent.pt does not fit the settings in config.json"):
        load_actor(run)
    with pytest.raises(UserError, match=r"agent.pt does not fit the settings in config.json"):
        Trainer(load_config(run), run, resume=True)


@pytest.mark.parametrize(
    "content, message",
    [
        (
            '{"seed": 0, "ev',
            r"summary.json is damaged .*: covr-fast train PRESET --resume .* writes it again",
        ),
        ("[]", r"summary.json is damaged \(no JSON object\)"),
        ("{}", r"summary.json lacks decisions, device, environment"),
        ("\udcff", r"summary.json is damaged"),
    ],
)
def test_a_damaged_summary(content, message, tmp_path):
    (tmp_path / "summary.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message) as caught:
        read_summary(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_run_that_moved_is_whole(run, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    moved = run.rename(tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path)
    load_actor(moved.relative_to(tmp_path))
    assert Trainer(load_config(moved), moved.relative_to(tmp_path), resume=True).run()["steps"] == 120


def test_what_is_written_whole_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "file"
    for content in ("one", "two"):
        write_whole(path, content)
    with pytest.raises(TypeError):
        write_whole(path, 3)
    assert path.read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]
