"""Which OpenGL draws DMControl's frames."""

import os
import subprocess
import sys

import pytest

from covr_fast import opengl

NAMES = "__EGL_VENDOR_LIBRARY_FILENAMES"
VARIABLES = (NAMES, "__EGL_VENDOR_LIBRARY_DIRS", "MUJOCO_EGL_DEVICE_ID")


@pytest.fixture(autouse=True)
def mesa(monkeypatch, tmp_path):
    """Mesa's file, and an environment that says nothing."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "50_mesa.json"
    file.write_text("{}")
    monkeypatch.setattr(opengl, "MESA", file)
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


def test_without_mesa_the_driver_draws(mesa):
    mesa.unlink()
    opengl._prefer_mesa()
    assert NAMES not in os.environ


def test_a_process_that_draws_has_chosen():
    code = f"import os; from covr_fast.opengl import *; require_frames(); print(MESA, os.getenv({NAMES!r}))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    file, chosen = told.stdout.split()[-2:]
    assert chosen == (file if os.path.exists(file) else "None")
