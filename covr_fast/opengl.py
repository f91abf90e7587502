"""The system's OpenGL, with which EnvPool draws DMControl's frames."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from functools import cache
from typing import Any

from .errors import UserError

DRAWING = threading.Lock()
"""Taken by whoever draws, or frees what was drawn with: of two threads that draw at the same time, each in a
context of its own, one may never come back from Mesa (seen in 22.3)."""

INSTALL = "apt install libegl1 libopengl0 libgl1-mesa-dri (without a GPU too: Mesa draws on the CPU)"


def import_envpool() -> Any:
    """EnvPool, with the system's OpenGL loaded first.

    The wheel bundles libEGL under a mangled name that MuJoCo's loader does not look for, so DMControl ends
    the process at its first frame unless the system's libraries are in it before EnvPool is.

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
def load_opengl() -> str | None:
    """Loads the system's OpenGL into the process, once. Returns what stands in the way, or None."""
    if sys.platform != "linux":
        return None
    if "envpool" in sys.modules and not hasattr(ctypes.CDLL(None), "eglGetProcAddress"):
        return (
            "envpool was imported before covr_fast could load the system's OpenGL: "
            "call covr_fast.make_env before `import envpool`"
        )
    with contextlib.suppress(OSError):  # what is asked for first, but EGL alone does
        ctypes.CDLL("libOpenGL.so.0", mode=ctypes.RTLD_GLOBAL)
    try:
        ctypes.CDLL("libEGL.so.1", mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return f"{error}: {INSTALL}"
    return None


@cache
def require_frames() -> None:
    """Draws one small frame, once in a process.

    Raises:
        UserError: this machine cannot; the message says how to mend it. (A libEGL without OpenGL in it ends
            the process even here: `covr-fast doctor` finds that in a child.)
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
    """Gives what closed environments have freed back to the system, where the C library can.

    An OpenGL context of software Mesa is some 60 MB, in pieces that the allocator would keep for each thread
    that has drawn.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
