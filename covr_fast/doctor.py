"""`covr-fast doctor`: what works on this machine, what is missing and how to install it."""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .machine import device_name, version
from .opengl import INSTALL

REQUIRED = (
    "envpool", "gymnasium", "transformers", "tokenizers", "peft", "accelerate", "huggingface_hub",
    "safetensors", "tyro", "filelock", "rich", "tensorboard", "matplotlib", "imageio", "imageio-ffmpeg",
    "pillow", "markupsafe", "rliable", "scipy",
)  # fmt: skip
OPTIONAL = {
    "triton": "triton", "bitsandbytes": "quantize", "flash-attn-4": "flash", "stable-baselines3": "sb3",
    "torchrl": "torchrl", "carla": "carla",
}  # fmt: skip
"""Package -> the extra of covr-fast that brings it."""
ENVIRONMENTS = {
    "CarRacing": ("CarRacing-v3", "pip install --force-reinstall envpool"),
    "DMControl": ("CheetahRun-v1", INSTALL),
}
"""An environment of each kind, and the remedy where it gives no frame."""

_FIRST_FRAME = """
import sys
from covr_fast.env_config import EnvConfig
from covr_fast.envs import make_env
from covr_fast.errors import UserError
try:
    with make_env(EnvConfig(id=sys.argv[1], num_envs=1, batch_size=1, frame_stack=1)) as envs:
        if envs.reset().std() == 0:
            sys.exit("its frame is empty")
except UserError as error:
    sys.exit(str(error))
"""


def problem_of(code: str, *arguments: str, timeout: float = 120) -> str | None:
    """Runs Python code in a child process, which may abort or hang without harm to this one.

    Returns its last line of output, or how it ended; None if it succeeded within `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:  # MuJoCo writes a log here when it aborts
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-c", code, *arguments]
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"no answer after {timeout:g} seconds"
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    last = lines[-1] if lines else "it says nothing"
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return last if done.returncode == 1 else f"the process ended with {how}: {last}"


def _problem_with(kind: str) -> str | None:
    """Why this kind of environment gives no frame here, and the remedy; None if it gives one."""
    env_id, remedy = ENVIRONMENTS[kind]
    problem = problem_of(_FIRST_FRAME, env_id)
    # Messages of covr_fast contain the remedy already.
    return problem if problem is None or "install " in problem else f"{problem}: {remedy}"


def _kernel_obstacles() -> list[str]:
    """Why the kernels of this build do not run on some of the CUDA devices."""
    from .architectures import kernel_obstacle

    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    reasons = [kernel_obstacle(device) for device in devices]
    return sorted({reason for reason in reasons if reason is not None})


def diagnose() -> dict[str, Any]:
    """The diagnosis as plain types.

    "ready_to_train" says whether `covr-fast train carracing` can run. "environments" gives for "CarRacing"
    and for "DMControl", which also needs OpenGL, why there is no frame of it here; None if there is one.
    "extension" has what its CUDA kernels were built for and why they do not run on some of the devices.
    """
    try:
        from . import _C

        extension = {
            "built": True,
            "with_cuda": _C.with_cuda,
            "cuda_architectures": _C.cuda_architectures,
            "obstacles": _kernel_obstacles(),
        }
    except ImportError as error:
        extension = {"built": False, "with_cuda": False, "error": str(error)}
    required = {name: version(name) for name in REQUIRED}
    with ThreadPoolExecutor() as pool:
        environments = dict(zip(ENVIRONMENTS, pool.map(_problem_with, ENVIRONMENTS), strict=True))
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "covr-fast": version("covr-fast"),
        "python": platform.python_version(),
        "processor": device_name("cpu"),
        "torch": torch.__version__,
        "cuda_devices": devices,
        "nvcc": shutil.which("nvcc"),
        "extension": extension,
        "required": required,
        "optional": {name: version(name) for name in OPTIONAL},
        "environments": environments,
        "ready_to_train": extension["built"] and all(required.values()) and environments["CarRacing"] is None,
    }


def print_diagnosis(d: dict[str, Any]) -> None:
    """Prints the diagnosis, with a remedy for everything that is missing.

    It needs no other packages than Python's: those that print nicer tables may be missing.
    """
    without = [kind for kind, problem in d["environments"].items() if problem]
    verdict = f"ready, but for {' and '.join(without)}: see above" if without else "ready"
    if not d["ready_to_train"]:
        verdict = "not ready, see above"
    extension = d["extension"]
    if not extension["built"]:
        native = f"missing ({extension['error']}): pip install -e ."
    elif extension["with_cuda"]:
        kernels = f"with CUDA kernels for {extension['cuda_architectures']}"
        native = "; but ".join([kernels, *extension["obstacles"]])
    else:
        # AUTO left them out for a reason that pip does not show.
        advice = "; nvcc is here: reinstall with COVR_CUDA=ON, which builds the CUDA kernels or says why not"
        native = "CPU only" + (advice if d["nvcc"] else "")
    missing = "missing: pip install 'covr-fast[{}]'"
    rows = [
        ("covr-fast", str(d["covr-fast"])),
        ("python, torch", f"{d['python']}, {d['torch']}"),
        ("processor", d["processor"]),
        ("CUDA devices", ", ".join(d["cuda_devices"]) or "none: everything runs on the CPU"),
        ("C++ extension", native),
        *((name, version or missing.format("train")) for name, version in d["required"].items()),
        *(
            (f"{name} (optional)", version or missing.format(OPTIONAL[name]))
            for name, version in d["optional"].items()
        ),
        *((f"{kind} frames", problem or "drawn") for kind, problem in d["environments"].items()),
        ("covr-fast train", verdict),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
