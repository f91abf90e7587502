#!/usr/bin/env bash
# The C++ by the compilers of other machines, without a warning: the extension, and the tests of what it computes.
#
#   tests/compilers.sh [COMPILER...]     g++-11 (Ubuntu 22.04, RHEL 9) and clang++ by default; PYTHON names the
#                                        interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
python=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)')
PATH=$(dirname "$python"):$PATH # cmake and ninja may live in its environment

compilers=("$@")
[ $# -gt 0 ] || compilers=(g++-11 clang++)
for compiler in "${compilers[@]}"; do
  command -v "$compiler" >/dev/null || {
    echo "$compiler is missing: apt install g++-11 clang" >&2
    exit 1
  }
  echo "== $("$compiler" --version | head -n 1)"
  stage=$PWD/build/$compiler
  rm -rf "$stage"
  mkdir -p "$stage/tree"
  cp -r covr_fast kernels tests setup.py pyproject.toml "$stage/tree"
  rm -f "$stage"/tree/covr_fast/_C*.so
  CXX=$compiler cmake -S . -B "$stage/cmake" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCOVR_CUDA=OFF \
    -DCMAKE_CXX_FLAGS=-Werror -DCOVR_OUTPUT_DIR="$stage/tree/covr_fast" -DPython_EXECUTABLE="$python" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >"$stage/build.log" &&
    cmake --build "$stage/cmake" >>"$stage/build.log" || { cat "$stage/build.log"; exit 1; }
  (
    cd "$stage/tree"
    export PYTHONPATH=$PWD COVR_EXAMPLES=10
    "$python" -c "from covr_fast import _C; assert _C.__file__.startswith('$PWD'), _C.__file__"
    "$python" -m pytest -q -p no:cacheprovider -m "not needs_cuda and not slow" -k "not operator_checks" \
      tests/ops tests/buffer/test_buffer.py --ignore=tests/ops/test_loss_compile.py
  )
done
