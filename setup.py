"""Builds the C++/CUDA extension `covr_fast._C` with CMake; everything else is in pyproject.toml.

Set COVR_CUDA=OFF|ON|AUTO (default AUTO: CUDA kernels are built when nvcc is found) and
COVR_CUDA_ARCHITECTURES (CMake syntax) to choose what is compiled.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CleanBuild(build):
    """Starts from an empty staging folder: the wheel gets all that lies there, modules of old included."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Runs CMake for the one extension module and leaves the library where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        cuda = os.environ.get("COVR_CUDA", "AUTO").upper()
        if cuda not in {"OFF", "ON", "AUTO"}:
            raise SystemExit(f"COVR_CUDA={cuda!r} is not one of OFF, ON, AUTO")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        cmake = shutil.which("cmake") or "cmake"
        configure = [
            cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCOVR_CUDA={cuda}",
            f"-DCOVR_OUTPUT_DIR={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        if architectures := os.environ.get("COVR_CUDA_ARCHITECTURES"):
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        tools = _tools(configure)
        record = folder / "configured_with.json"
        if not record.is_file() or record.read_text() != tools:
            shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(configure, check=True)
        record.write_text(tools)
        subprocess.run([cmake, "--build", str(folder), "--parallel", jobs], check=True)


def _tools(configure: list[str]) -> str:
    """What CMake's cache depends on: its options, where the tools lie, and what chooses them.

    CMake keeps what it found the first time: also the ninja of an isolated build, whose environment is gone
    by the next, and that there was no nvcc yet. So a folder that was configured otherwise is begun anew.
    """
    paths = {name: shutil.which(name) for name in ("ninja", "c++", "nvcc")}
    chosen = {
        name: os.environ.get(name)
        for name in ("CC", "CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAHOSTCXX", "CUDAFLAGS", "CUDAARCHS")
    }
    return json.dumps([configure, paths, chosen], indent=1)


setup(
    packages=[*find_packages(include=["covr_fast", "covr_fast.*"]), "covr_fast.kernels.triton"],
    # The Triton sources live beside the CUDA ones and install as part of the package.
    package_dir={"covr_fast.kernels.triton": "kernels/triton"},
    package_data={"covr_fast": ["py.typed", "*.pyi", "sweeps/specs/*.toml"]},
    ext_modules=[Extension("covr_fast._C", sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
)
