#!/usr/bin/env bash
# The C++ under sanitizers: AddressSanitizer and UndefinedBehaviorSanitizer over the kernels, also those for CUDA,
# and the replay buffer; ThreadSanitizer over what several threads run. Exits with an error at the first finding.
#
#   tests/sanitize.sh [address] [thread]     both by default; PYTHON names the interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
python=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)')
PATH=$(dirname "$python"):$PATH # cmake and ninja may live in its environment
unset COVR_CUDA_ON_CPU # set below, for the tests that it is for

# build KIND SANITIZERS: a copy of the package with an instrumented extension, in build/KIND-sanitizer/tree. The
# extension has its CUDA kernels, compiled for the CPU.
build() {
  local stage=$PWD/build/$1-sanitizer
  local tree=$stage/tree
  PYTHON=$python tests/cuda_on_cpu/build.sh "$stage/lib" "$2" >/dev/null
  rm -rf "$tree"
  mkdir "$tree"
  cp -r covr_fast kernels tests setup.py pyproject.toml "$tree"
  rm -f "$tree"/covr_fast/_C*.so
  cp "$stage"/lib/_C*.so "$tree/covr_fast"
}

# check KIND RUNTIME OPTIONS ARGUMENTS...: pytest in that copy. Python itself is not instrumented, so the sanitizer's
# runtime is loaded first, and libstdc++ with it for the exceptions it intercepts.
check() {
  local kind=$1 runtime=$2 options=$3
  shift 3
  (
    cd "build/$kind-sanitizer/tree"
    preload="$(g++ -print-file-name="$runtime") $(g++ -print-file-name=libstdc++.so)"
    # A buffer that no memory can hold has to be refused as without a sanitizer: by malloc, not by an abort.
    options+=:allocator_may_return_null=1
    export ASAN_OPTIONS=$options TSAN_OPTIONS=$options UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
    export LD_PRELOAD=$preload PYTHONPATH=$PWD PYTHONMALLOC=malloc COVR_EXAMPLES=10
    "$python" -c "from covr_fast import _C; assert _C.__file__.startswith('$PWD'), _C.__file__"
    # Graphs are compiled in code that is not instrumented; the largest inputs have no paths of their own.
    # A report ends the process: captured by file descriptor it would be lost.
    if [ "${COVR_CUDA_ON_CPU:-}" ]; then tests="needs_cuda"; else tests="not needs_cuda"; fi
    "$python" -m pytest -q -p no:cacheprovider --capture=sys -m "$tests" \
      -k "not compile and not operator_checks and not full_vocabulary and not more_than_torch and not -4000- and not pinned" "$@"
  )
}

kinds=("$@")
[ $# -gt 0 ] || kinds=(address thread)
for kind in "${kinds[@]}"; do
  echo "== $kind sanitizer"
  case $kind in
    address)
      build address address,undefined
      # Python itself leaks at exit, and torch allocates with mismatched pairs. A child that was forked while another
      # thread allocated would wait for the sanitizer's own lock for ever.
      check address libasan.so detect_leaks=0:alloc_dealloc_mismatch=0 tests/ops tests/buffer \
        --ignore=tests/buffer/test_buffer_processes.py
      lib=$PWD/build/address-sanitizer/lib
      "$lib/emulator_test"
      if "$lib/emulator_test" beyond 2>/dev/null; then
        echo "a write behind the shared memory of a block was not found" >&2
        exit 1
      fi
      COVR_CUDA_ON_CPU_SEED=3 COVR_CUDA_ON_CPU=$(echo "$lib"/_C*.so) \
        check address libasan.so detect_leaks=0:alloc_dealloc_mismatch=0 tests/ops tests/buffer \
        --ignore=tests/ops/test_loss.py
      ;;
    thread)
      build thread thread
      # Three threads even where the tests ask for one. torch's own are not instrumented: only races in this
      # project's code count.
      COVR_TEST_THREADS=3 check thread libtsan.so ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=66 \
        tests/ops tests/buffer/test_buffer_threads.py tests/buffer/test_buffer.py
      ;;
    *)
      echo "unknown sanitizer: $kind (address or thread)" >&2
      exit 2
      ;;
  esac
done
echo "sanitizers: nothing found (${kinds[*]})"
