#!/usr/bin/env bash
# Every CUDA kernel on the CPU, in several orders of its threads and blocks, and with planted faults.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
COVR_CUDA_ON_CPU=$(PYTHON=$python tests/cuda_on_cpu/build.sh build/cuda_on_cpu "" all)
export COVR_CUDA_ON_CPU
# The loss is Triton's, and a million returns by threads that are no threads take minutes.
for seed in 1 2; do # with 132 and with 1 multiprocessors
  COVR_CUDA_ON_CPU_SEED=$seed "$python" -m pytest -q -m needs_cuda -k "not -4000-" tests/ops tests/buffer \
    --ignore=tests/ops/test_loss.py
done
"$python" -m pytest -q tests/cuda_on_cpu
