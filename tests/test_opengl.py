"""Which OpenGL draws DMControl's frames."""

import importlib.util
import os
import subprocess
import sys

import pytest

from covr_fast import opengl

NAMES = "__EGL_VENDOR_LIBRARY_FILENAMES"
VARIABLES = (NAMES, "__EGL_VENDOR_LIBRARY_DIRS", "MUJOCO_EGL_DEVICE_ID")


@pytest.fixture(autouse=True)
def mesa(monkeypatch, tmp_path):
    """Mesa's file and a driver, and an environment that says nothing."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "50_mesa.json"
    file.write_text("{}")
    (tmp_path / "swrast_dri.so").touch()
    monkeypatch.setattr(opengl, "MESA", file)
    monkeypatch.setattr(opengl, "MESA_DRIVERS", (str(tmp_path / "*_dri.so"),))
    return file


def test_mesa_is_preferred_where_it_is_installed(mesa, monkeypatch):
    monkeypatch.setenv(NAMES, "")  # so that it is as before when the test ends
    del os.environ[NAMES]
    opengl._prefer_mesa()
    assert os.environ[NAMES] == str(mesa)


@pytest.mark.parametrize("name", VARIABLES)
def test_what_the_environment_says_stays(name, monkeypatch):
    monkeypatch.setenv(name, "0")
    before = dict(os.environ)
    opengl._prefer_mesa()
    assert dict(os.environ) == before


@pytest.mark.parametrize("missing", ["50_mesa.json", "swrast_dri.so"])
def test_without_mesa_or_its_driver_the_gpu_draws(mesa, missing):
    (mesa.parent / missing).unlink()
    opengl._prefer_mesa()
    assert NAMES not in os.environ


def process(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_process_that_draws_has_chosen():
    code = f"import os; from covr_fast import opengl; opengl.require_frames(); print(os.getenv({NAMES!r}))"
    told = process(code)
    assert told.returncode == 0
    assert told.stdout.split()[-1] == "/usr/share/glvnd/egl_vendor.d/50_mesa.json"  # `make` installs it


def test_triton_may_be_imported_after_a_picture():
    """torch.optim does so, when an agent is built after its environments."""
    code = (
        "from covr_fast import EnvConfig, make_env\n"
        "with make_env(EnvConfig('CheetahRun-v1', num_envs=1, batch_size=1)) as envs:\n"
        "    envs.reset()\n"
        "    import torch._dynamo\n"
    )
    done = process(code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_triton_is_there_before_a_users_environment_draws():
    code = (
        "import sys\n"
        "from covr_fast import GymEnv\n"
        "from covr_fast.tasks import find_task\n"
        "def make():\n"
        "    sys.exit('triton' not in sys.modules)\n"
        "find_task(GymEnv(make=make))\n"
    )
    done = process(code)
    assert (done.returncode, done.stderr) == (0, "")
