"""What a figure was measured on: the device, and the versions of the packages that computed it."""

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import torch

COMPUTING = ("torch", "numpy", "transformers", "peft", "triton", "flash-attn-4", "envpool", "gymnasium")
"""The packages on which the outcome or the speed of a run depends."""


def device_name(device: torch.device | str) -> str:
    """The GPU's name, or the processor's with the number of its cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    models = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def version(package: str) -> str | None:
    """Of an installed package; None if it is missing. Nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(packages: Iterable[str] = COMPUTING) -> dict[str, str]:
    """Of Python, and of those packages that are installed."""
    found = {name: version(name) for name in packages}
    return {"python": platform.python_version()} | {name: v for name, v in found.items() if v is not None}
