import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from small_runs import at_each_step, roundless, small_config

from covr_fast import Trainer
from covr_fast.errors import UserError
from covr_fast.run_folder import RunFolder

CLAIM = """
import sys, time
from covr_fast.run_folder import RunFolder
with RunFolder(sys.argv[1]).claimed(resume=False):
    print("claimed", flush=True)
    time.sleep(60)
"""


def refuses(path: Path, message: str, *, resume: bool = False) -> None:
    with pytest.raises(UserError, match=message), RunFolder(path).claimed(resume=resume):
        pass


def test_one_process_at_a_time_and_none_after_it_was_killed(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-c", CLAIM, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "claimed\n"
        refuses(run, "is being written by another run")
        process.send_signal(signal.SIGKILL)
    with RunFolder(run).claimed(resume=False):
        pass


def test_two_trainers_of_one_process_do_not_share_a_folder(tmp_path):
    first, second = (Trainer(roundless(steps=48), tmp_path / "run") for _ in range(2))
    refused = []

    def the_other_tries(_rows):
        if not refused:
            with pytest.raises(UserError, match="is being written by another run") as caught:
                second.run()
            refused.append(caught)
            with pytest.raises(UserError, match="is being written by another run"):
                Trainer(small_config(), tmp_path / "run", resume=True)

    at_each_step(first, the_other_tries)
    assert first.run()["steps"] == 48
    with pytest.raises(UserError, match="already holds a run: choose another folder") as refused_later:
        second.run()
    assert "(--out, or Trainer's out), or continue it (--resume " in str(refused_later.value)
    assert str(refused_later.value).endswith(", or Trainer's resume=True)"), "a script has no --resume"


def test_claims_nest_and_end(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.claimed(resume=False):
        with folder.claimed(resume=False):
            (folder.path / "config.json").write_text("{}")
        refuses(folder.path, "another run", resume=True)
    with RunFolder(folder.path).claimed(resume=True):
        pass


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path):
    folder = RunFolder(tmp_path / "a" / "b")
    with folder.claimed(resume=False):
        assert folder.path.is_dir()
    assert not list(tmp_path.iterdir())


def test_folders_found_at_the_same_time_are_different(tmp_path):
    (tmp_path / "runs" / "it-2").mkdir(parents=True)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(RunFolder.numbered(tmp_path / "runs" / "it").path.name))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(["it", *(f"it-{i}" for i in range(3, 10))])


@pytest.mark.parametrize("trace", ["metrics.jsonl", "checkpoint", "checkpoint.old", "summary.json"])
def test_what_is_left_of_a_run_is_not_overwritten(trace, tmp_path):
    (tmp_path / trace).mkdir()
    refuses(tmp_path, "already holds a run")


def test_places_where_no_folder_can_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path, message in (
        (tmp_path / "file", "file is a file, not a folder"),
        (tmp_path / "file" / "run", "file is a file, not a folder"),
        (Path("/proc/run"), "cannot be made"),
        (tmp_path / "none", "holds no run: give"),
    ):
        refuses(path, message, resume=path.name == "none")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    if os.geteuid():  # root may write everywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        refuses(tmp_path / "locked", "cannot be")
