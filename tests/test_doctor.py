"""What the doctor says of environments, which may abort or hang the process that draws them."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import covr_fast._C
from covr_fast.doctor import REQUIRED, print_diagnosis, problem_of


@pytest.mark.parametrize(
    "code, problem",
    [
        ("print('fine')", None),
        ("import os, sys; print('no EGL', file=sys.stderr, flush=True); os.abort()", "signal 6: no EGL"),
        ("import os; os._exit(134)", "exit code 134: it says nothing"),
        ("import sys; sys.exit('no frame: install it')", "no frame: install it"),
        ("raise RuntimeError('broken')", "RuntimeError: broken"),
        ("import sys; sys.exit(sys.argv[1])", "handed over"),
    ],
)
def test_how_a_process_ended(code, problem):
    found = problem_of(code, "handed over")
    assert found is None if problem is None else found.endswith(problem)


def test_the_packages_of_the_extra_for_training_are_looked_for():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    needed = {re.split("[<>=;~ ]", package)[0] for package in project["optional-dependencies"]["train"]}
    assert set(REQUIRED) == needed


def test_a_process_that_hangs_is_ended():
    assert problem_of("import time; time.sleep(600)", timeout=0.5) == "no answer after 0.5 seconds"


def doctor(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "covr_fast.cli", "doctor", "--json"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def test_frames_of_both_kinds_are_drawn_here():
    done = doctor()
    diagnosis = json.loads(done.stdout)
    assert (done.returncode, diagnosis["ready_to_train"]) == (0, True)
    assert diagnosis["environments"] == {"CarRacing": None, "DMControl": None}


def test_the_verdict_names_what_cannot_be_drawn(capsys):
    diagnosis = json.loads(doctor().stdout)
    for environments, verdict in (
        ({"CarRacing": None, "DMControl": None}, "ready"),
        ({"CarRacing": None, "DMControl": "no libEGL"}, "ready, but for DMControl: see above"),
    ):
        print_diagnosis(diagnosis | {"environments": environments})
        assert capsys.readouterr().out.splitlines()[-1].removeprefix("covr-fast train").strip() == verdict


DIAGNOSIS = {
    "covr-fast": "0.1.0", "python": "3.11.7", "processor": "Z80, 2 cores", "torch": "2.13.0",
    "cuda_devices": ["Tesla T4"], "nvcc": "/usr/bin/nvcc", "required": {}, "optional": {}, "environments": {},
    "ready_to_train": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "extension, said",
    [
        ({"with_cuda": True, "cuda_architectures": "80-real,90", "obstacles": []}, "for 80-real,90"),
        ({"with_cuda": True, "cuda_architectures": "90", "obstacles": ["T4 is 75"]}, "for 90; but T4 is 75"),
        ({"with_cuda": False}, "reinstall with COVR_CUDA=ON, which builds the CUDA kernels or says why not"),
    ],
)
def test_what_the_kernels_were_built_for(extension, said, capsys):
    print_diagnosis(DIAGNOSIS | {"extension": {"built": True} | extension})
    (line,) = (row for row in capsys.readouterr().out.splitlines() if row.startswith("C++ extension"))
    assert line.endswith(said)


@pytest.mark.skipif(sys.platform != "linux", reason="how Linux loads OpenGL")
@pytest.mark.parametrize("library", ["one that cannot be loaded", "one without OpenGL in it"])
def test_car_racing_trains_where_dm_control_would_end_the_process(library, tmp_path):
    loads = library == "one without OpenGL in it"
    (tmp_path / "libEGL.so.1").write_bytes(Path(covr_fast._C.__file__).read_bytes() if loads else b"")
    done = doctor(LD_LIBRARY_PATH=str(tmp_path))
    assert done.returncode == 0
    diagnosis = json.loads(done.stdout)
    assert diagnosis["ready_to_train"] is True
    assert diagnosis["environments"]["CarRacing"] is None
    assert "apt install libegl1" in diagnosis["environments"]["DMControl"]
