"""What this machine can do, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from typing import Any

import torch

REQUIRED = (
    "envpool",
    "gymnasium",
    "transformers",
    "peft",
    "safetensors",
    "tyro",
    "rich",
    "tensorboard",
    "matplotlib",
    "imageio",
    "pillow",
)
OPTIONAL = {
    "triton": "pip install 'covr-fast[triton]'",
    "flash-attn-4": "pip install 'covr-fast[flash]'",
    "stable-baselines3": "pip install 'covr-fast[sb3]'",
    "torchrl": "pip install 'covr-fast[torchrl]'",
}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extension() -> dict[str, Any]:
    try:
        from . import _C
    except ImportError as error:
        return {"built": False, "with_cuda": False, "error": str(error)}
    return {"built": True, "with_cuda": bool(_C.with_cuda)}


def diagnose() -> dict[str, Any]:
    """The diagnosis as plain types; "ready_to_train" says whether `covr-fast train` can run."""
    extension = _extension()
    required = {name: _version(name) for name in REQUIRED}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "covr-fast": _version("covr-fast"),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "cuda_devices": devices,
        "nvcc": shutil.which("nvcc"),
        "extension": extension,
        "required": required,
        "optional": {name: _version(name) for name in OPTIONAL},
        "ready_to_train": extension["built"] and all(required.values()),
    }


def print_diagnosis(d: dict[str, Any]) -> None:
    """Prints the diagnosis with a remedy beside what is missing. It needs nothing but Python: what would make
    a nicer table may be what is missing."""
    extension = d["extension"]
    if not extension["built"]:
        native = f"missing ({extension['error']}): pip install -e ."
    elif extension["with_cuda"]:
        native = "with CUDA kernels"
    else:
        native = "CPU only" + ("; nvcc is here: reinstall to build the CUDA kernels" if d["nvcc"] else "")
    rows = [
        ("covr-fast", str(d["covr-fast"])),
        ("python, torch, cores", f"{d['python']}, {d['torch']}, {d['cores']}"),
        ("CUDA devices", ", ".join(d["cuda_devices"]) or "none: everything runs on the CPU"),
        ("C++ extension", native),
        *(
            (name, version or "missing: pip install 'covr-fast[train]'")
            for name, version in d["required"].items()
        ),
        *(
            (f"{name} (optional)", version or f"missing: {OPTIONAL[name]}")
            for name, version in d["optional"].items()
        ),
        ("covr-fast train", "ready" if d["ready_to_train"] else "not ready, see above"),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
