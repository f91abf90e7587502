#!/usr/bin/env bash
# Builds the extension with its CUDA kernels compiled for the CPU, and prints its path.
#
#   tests/cuda_on_cpu/build.sh [FOLDER] [SANITIZERS] [TARGET]     PYTHON names the interpreter
#
# FOLDER is build/cuda_on_cpu unless given. TARGET is `extension`, or `all` with the planted faults.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)')
PATH=$(dirname "$python"):$PATH # cmake and ninja may live in its environment
folder=${1:-build/cuda_on_cpu}
mkdir -p "$folder"
{
  cmake -S tests/cuda_on_cpu -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=None -DCOVR_SANITIZE="${2:-}" \
    -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" &&
    cmake --build "$folder" --target "${3:-extension}" emulator_test device_guard
} >"$folder/build.log" 2>&1 || { cat "$folder/build.log" >&2; exit 1; }
realpath "$folder"/_C*.so
