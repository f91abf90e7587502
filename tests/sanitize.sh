#!/usr/bin/env bash
# Builds the C++ kernels with sanitizers and runs their tests: ASan and UBSan over all of them, TSan over the
# threaded ones. The interpreter is not instrumented, so the sanitizer's runtime is preloaded.
#
#   tests/sanitize.sh [address|thread]     both by default; PYTHON names the interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

run() {  # sanitizers, runtime library, options variable, its value, pytest arguments...
  local sanitizers=$1 runtime=$2 variable=$3 options=$4
  shift 4
  local work
  work=$(mktemp -d)
  cmake -S . -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCOVR_CUDA=OFF \
    -DCOVR_SANITIZE="$sanitizers" -DCOVR_OUTPUT_DIR="$work/covr_fast" -DPython_EXECUTABLE="$(command -v "$python")" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >"$work/configure.log"
  cmake --build "$work/build" >"$work/build.log" || { cat "$work/build.log"; exit 1; }
  cp -r covr_fast/. "$work/covr_fast_sources"
  rm -f "$work"/covr_fast_sources/_C*.so
  cp -r "$work/covr_fast_sources/." "$work/covr_fast/"
  mkdir "$work/kernels" && cp -r kernels/triton "$work/kernels/" && cp setup.py "$work/"
  cp -r tests pyproject.toml "$work/"
  (cd "$work" && env LD_PRELOAD="$(g++ -print-file-name="$runtime") $(g++ -print-file-name=libstdc++.so)" \
    "$variable=$options" PYTHONPATH="$work" PYTHONMALLOC=malloc \
    COVR_EXAMPLES=10 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
    "$python" -m pytest -q -p no:cacheprovider -m "not needs_cuda" "$@")
  rm -rf "$work"
}

kinds=${1:-address thread}
# Tests that compile graphs spend their time in uninstrumented code; the largest inputs have no new paths.
skip="not compile and not operator_checks and not full_vocabulary and not more_than_torch"
for kind in $kinds; do
  case $kind in
    address)
      # Python itself leaks at exit, and torch allocates with mismatched pairs.
      run address,undefined libasan.so ASAN_OPTIONS detect_leaks=0:alloc_dealloc_mismatch=0 \
        tests/ops -k "$skip"
      ;;
    thread)
      # torch's own OpenMP threads are not instrumented: only races in this project's code count.
      run thread libtsan.so TSAN_OPTIONS "ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=66" \
        tests/ops/test_returns.py tests/ops/test_filter.py tests/ops/test_frames.py \
        -k "(threads or large or against_pad or error_is_not_larger) and $skip"
      ;;
    *)
      echo "unknown sanitizer run: $kind (address or thread)" >&2
      exit 2
      ;;
  esac
done
