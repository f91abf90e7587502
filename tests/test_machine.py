"""What a figure was measured on."""

import os
import platform
import sys
from importlib.metadata import version as installed
from pathlib import Path

import pytest
import torch

from covr_fast.machine import device_name, version, versions


def test_versions_are_those_that_are_installed():
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == installed("torch")
    assert versions(["no-such-package", "numpy"]) == {"python": found["python"], "numpy": installed("numpy")}
    assert version("no-such-package") is None


def test_the_processor_is_named_with_its_cores():
    assert device_name("cpu").endswith(f", {os.cpu_count()} cores")
    if sys.platform == "linux" and "model name" in (cpuinfo := Path("/proc/cpuinfo").read_text()):
        assert device_name("cpu").split(",")[0] in cpuinfo


@pytest.mark.parametrize("processor, name", [("arm", "arm"), ("", "aarch64")])
def test_without_proc_the_processor_s_kind_is_named(processor, name, monkeypatch):
    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(platform, "processor", lambda: processor)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert device_name("cpu").startswith(f"{name}, ")


def test_a_gpu_has_its_own_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    assert device_name("cuda:1") == "GPU cuda:1"
