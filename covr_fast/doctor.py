"""What this machine can do, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

REQUIRED = (
    "envpool",
    "gymnasium",
    "transformers",
    "peft",
    "safetensors",
    "tyro",
    "tensorboard",
    "matplotlib",
    "imageio",
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
    """Prints the diagnosis as a table, with a remedy beside what is missing."""
    table = Table(title="covr-fast doctor", title_justify="left", show_header=False)
    extension = d["extension"]
    table.add_row("covr-fast", str(d["covr-fast"]))
    table.add_row("python, torch, cores", f"{d['python']}, {d['torch']}, {d['cores']}")
    table.add_row("CUDA devices", ", ".join(d["cuda_devices"]) or "none: everything runs on the CPU")
    if not extension["built"]:
        table.add_row("C++ extension", f"missing ({extension['error']}): pip install -e .")
    else:
        built = "with CUDA kernels" if extension["with_cuda"] else "CPU only"
        hint = (
            "; nvcc is here: reinstall to build the CUDA kernels"
            if d["nvcc"] and not extension["with_cuda"]
            else ""
        )
        table.add_row("C++ extension", built + hint)
    for name, version in d["required"].items():
        table.add_row(name, version or "missing: pip install 'covr-fast[train]'")
    for name, version in d["optional"].items():
        table.add_row(f"{name} (optional)", version or f"missing: {OPTIONAL[name]}")
    table.add_section()
    table.add_row("covr-fast train", "ready" if d["ready_to_train"] else "not ready, see above")
    Console(highlight=False, markup=False).print(table)
