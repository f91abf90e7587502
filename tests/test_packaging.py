"""What pip builds: the wheel's contents, and the answers to COVR_CUDA."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def source(tmp_path):
    """A copy of the sources, as a source checkout without build products has them."""
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "build", "runs", "*.so", "*.egg-info", "__pycache__", ".*_cache"
    )
    return Path(shutil.copytree(ROOT, tmp_path / "source", ignore=ignore))


def wheel(source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-v",
        "-w",
        str(out),
        str(source),
    ]
    scripts = os.path.dirname(sys.executable)  # cmake and ninja come from PyPI
    env = os.environ | {"PATH": scripts + os.pathsep + os.environ["PATH"]} | environment
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def test_the_wheel_holds_the_extension_and_the_triton_sources_and_no_tests(source, tmp_path):
    done = wheel(source, tmp_path / "out", COVR_CUDA="OFF")
    assert done.returncode == 0, done.stdout[-3000:]
    (path,) = (tmp_path / "out").glob("covr_fast-*.whl")
    names = zipfile.ZipFile(path).namelist()
    assert any(n.startswith("covr_fast/_C.") and n.endswith(".so") for n in names)
    triton = {p.name for p in (ROOT / "kernels" / "triton").glob("*.py")}
    assert triton == {Path(n).name for n in names if n.startswith("covr_fast/kernels/triton/")}
    assert "covr_fast/py.typed" in names
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"covr_fast"}
    assert not [n for n in names if "test" in n.lower()]


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"COVR_CUDA": "ON", "CUDACXX": "/nowhere/nvcc"}, "COVR_CUDA=ON but no CUDA compiler was found"),
        ({"COVR_CUDA": "MAYBE"}, "COVR_CUDA='MAYBE' is not one of OFF, ON, AUTO"),
    ],
)
def test_cuda_that_cannot_be_had_is_a_clear_error(environment, message, source, tmp_path):
    done = wheel(source, tmp_path / "out", **environment)
    assert done.returncode != 0
    assert message in " ".join((done.stdout + done.stderr).split())


def test_auto_leaves_cuda_out_quietly(source, tmp_path):
    scripts = os.path.dirname(sys.executable)
    environment = os.environ | {"PATH": scripts + os.pathsep + os.environ["PATH"], "CUDACXX": "/nowhere/nvcc"}
    cmake = shutil.which("cmake", path=environment["PATH"])
    assert cmake
    options = [
        "-G",
        "Ninja",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    command = [cmake, "-S", str(source), "-B", str(tmp_path / "build"), "-DCOVR_CUDA=AUTO", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "CUDA kernels OFF" in done.stdout
