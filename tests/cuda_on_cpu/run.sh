#!/usr/bin/env bash
# Every CUDA kernel on the CPU, in several orders of its threads and blocks, and with planted faults.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
COVR_CUDA_ON_CPU=$(PYTHON=$python tests/cuda_on_cpu/build.sh build/cuda_on_cpu "" all)
export COVR_CUDA_ON_CPU
check() {
  "$python" -m pytest -q -m needs_cuda "$@"
}
# The loss is Triton's, and millions of returns take minutes here.
operations=(tests/ops --ignore=tests/ops/test_loss.py -k "not -4000-")
COVR_CUDA_ON_CPU_SEED=1 check "${operations[@]}" # with 132 multiprocessors
COVR_CUDA_ON_CPU_SEED=2 check "${operations[@]}" # with one
COVR_CUDA_ON_CPU_SEED=1 check tests/buffer
mapfile -t others < <(grep -rl --include='test_*.py' needs_cuda tests | grep -v '^tests/\(ops\|buffer\|cuda_on_cpu\)/')
COVR_CUDA_ON_CPU_SEED=2 check "${others[@]}" # and in any new file
"$python" -m pytest -q tests/cuda_on_cpu
