"""The system's OpenGL, with which EnvPool renders DMControl's frames."""

import contextlib
import ctypes
import glob
import importlib
import os
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

from .errors import UserError

DRAWING = threading.Lock()
"""Locked while a thread renders, or frees a renderer. When two threads rendered at the same time, each in its
own OpenGL context, one of them sometimes never returned from Mesa (seen in 22.3)."""

MESA = Path("/usr/share/glvnd/egl_vendor.d/50_mesa.json")
"""Names Mesa to libEGL, where Mesa is installed."""
MESA_DRIVERS = ("/usr/lib/*/dri/*_dri.so", "/usr/lib*/dri/*_dri.so")
"""Where its drivers are, which come in a package of their own."""

INSTALL = "apt install libegl1 libopengl0 libgl1-mesa-dri (without a GPU too: Mesa draws on the CPU)"


def import_envpool() -> Any:
    """EnvPool, with the system's OpenGL loaded first.

    The wheel contains libEGL under a changed name, which MuJoCo does not find. Unless the system's libraries
    are loaded before EnvPool, DMControl ends the process at its first frame.

    Raises:
        UserError: EnvPool is not installed.
    """
    load_opengl()
    try:
        import envpool
    except ImportError as error:
        raise UserError("envpool is not installed: pip install 'covr-fast[train]'") from error
    return envpool


@cache
def load_triton() -> None:
    """Imports Triton, if it is installed, before anything draws.

    Mesa's driver makes the functions of the system's LLVM visible to every library that is loaded later.
    Triton has an LLVM of its own and would call the wrong one then: a segmentation fault. It need not be the
    user who imports Triton after a picture: torch.optim does.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("triton")


@cache
def load_opengl() -> str | None:
    """Loads the system's OpenGL into the process, once. Returns why that is impossible, or None."""
    load_triton()
    if sys.platform != "linux":
        return None
    if "envpool" in sys.modules and not hasattr(ctypes.CDLL(None), "eglGetProcAddress"):
        return (
            "envpool was imported before covr_fast could load the system's OpenGL: "
            "call covr_fast.make_env before `import envpool`"
        )
    _prefer_mesa()
    with contextlib.suppress(OSError):  # MuJoCo asks for this one first, but EGL is enough
        ctypes.CDLL("libOpenGL.so.0", mode=ctypes.RTLD_GLOBAL)
    try:
        ctypes.CDLL("libEGL.so.1", mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return f"{error}: {INSTALL}"
    return None


def _prefer_mesa() -> None:
    """Mesa on the CPU instead of a GPU's driver, unless the environment says otherwise.

    On an idle H200 a decision of Cartpole took 40 ms with NVIDIA's driver, 29 ms with Mesa on one core of
    that machine and 17 ms on three. While six runs and a test suite shared the GPU, none of the runs got 125
    pictures in five minutes. The likely cause: EnvPool gives its context back after every picture.
    """
    chosen = {"__EGL_VENDOR_LIBRARY_FILENAMES", "__EGL_VENDOR_LIBRARY_DIRS", "MUJOCO_EGL_DEVICE_ID"}
    installed = MESA.exists() and any(map(glob.glob, MESA_DRIVERS))
    if installed and not chosen & os.environ.keys():
        os.environ["__EGL_VENDOR_LIBRARY_FILENAMES"] = str(MESA)


@cache
def require_frames() -> None:
    """Renders one small frame, once in a process, to see whether this machine can.

    Raises:
        UserError: it cannot; the message gives the remedy. (With a libEGL without OpenGL the process ends
            here: `covr-fast doctor` finds that in a child process.)
    """
    envpool = import_envpool()
    problem = load_opengl()
    if problem is None:
        try:
            with DRAWING:
                env = envpool.make_gymnasium(
                    "CartpoleBalance-v1", render_mode="rgb_array", render_width=16, render_height=16
                )
                env.reset()
                env.render()
                del env
        except RuntimeError as error:
            problem = f"{error}: {INSTALL}"
    if problem is not None:
        raise UserError(f"DMControl cannot draw its frames here: {problem}")


def return_memory() -> None:
    """Returns the memory of closed environments to the system, where the C library can.

    An OpenGL context of software Mesa takes about 60 MB, in pieces that the allocator would keep for every
    thread that has rendered.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
