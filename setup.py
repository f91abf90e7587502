"""Builds the C++/CUDA extension `covr_fast._C` with CMake; everything else is in pyproject.toml.

Set COVR_CUDA=OFF|ON|AUTO (default AUTO: CUDA kernels are built when nvcc is found) and
COVR_CUDA_ARCHITECTURES (CMake syntax) to choose what is compiled.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Runs CMake for the one extension module and leaves the library where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        cuda = os.environ.get("COVR_CUDA", "AUTO").upper()
        if cuda not in {"OFF", "ON", "AUTO"}:
            raise SystemExit(f"COVR_CUDA={cuda!r} is not one of OFF, ON, AUTO")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        cmake = shutil.which("cmake") or "cmake"
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCOVR_CUDA={cuda}",
            f"-DCOVR_OUTPUT_DIR={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        if architectures := os.environ.get("COVR_CUDA_ARCHITECTURES"):
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)


setup(
    packages=[*find_packages(include=["covr_fast", "covr_fast.*"]), "covr_fast.kernels.triton"],
    # The Triton sources live beside the CUDA ones and install as part of the package.
    package_dir={"covr_fast.kernels.triton": "kernels/triton"},
    package_data={"covr_fast": ["py.typed"]},
    ext_modules=[Extension("covr_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
