# make demo: install into .venv and run the main job.   make test: install into .venv and run all tests.
# A second call reuses the environment. PYTHON=python3.12 chooses the interpreter (3.11 or newer).
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
TORCH ?= torch==2.13.0
PY := $(VENV)/bin/python
NATIVE := setup.py CMakeLists.txt $(wildcard cmake/* csrc/* csrc/*/* kernels/cuda/*)
CXX_FILES := $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp kernels/cuda/*.h kernels/cuda/*.cu \
  tests/cuda_on_cpu/*.cpp tests/cuda_on_cpu/*.cu tests/cuda_on_cpu/include/*.h)

.PHONY: demo test test-python test-folders test-vlm test-emulated package sanitize compilers lint format gpu-check clean system

demo: $(VENV)/train.stamp
	$(VENV)/bin/covr-fast train carracing

test: test-python test-folders test-vlm test-emulated

# Without a GPU, Triton's kernels run in its interpreter (the variable must be set before triton is imported).
test-python: $(VENV)/dev.stamp
	TRITON_INTERPRET=1 $(PY) -m pytest -q tests/ops/test_loss.py
	$(PY) -m pytest tests/test_*.py

# Of tests/, what lies in folders. Parts of their own, so that two cores are busy to the end.
test-folders: $(VENV)/dev.stamp
	$(PY) -m pytest tests --ignore=tests/vlm --ignore-glob='tests/test_*.py'

test-vlm: $(VENV)/dev.stamp
	$(PY) -m pytest tests/vlm

# The kernels for CUDA, compiled for the CPU.
test-emulated: $(VENV)/dev.stamp
	PYTHON=$(PY) tests/cuda_on_cpu/run.sh

# The package as users get it: from a source archive, twice in one folder, at the lowest versions allowed.
package: | system
	PYTHON=$(PYTHON) TORCH="$(TORCH)" tests/package.sh

# The C++ once more, under address, undefined-behaviour and thread sanitizers.
sanitize: $(VENV)/dev.stamp
	PYTHON=$(PY) tests/sanitize.sh

# The C++ by g++-11 and clang, which have to be installed.
compilers: $(VENV)/dev.stamp
	PYTHON=$(PY) tests/compilers.sh

# On a machine with a CUDA device: build, figures, a run, tests and sanitizers, in less than ten minutes. WHEELS=DIR
# without internet, OUT=DIR for the results, MINUTES=N and STAGES="NAME ..." for less of it.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(if $(WHEELS),--wheels $(WHEELS)) $(if $(OUT),--out $(OUT)) \
	  $(if $(MINUTES),--minutes $(MINUTES)) $(foreach stage,$(STAGES),--stage $(stage))

lint: $(VENV)/dev.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)
	$(VENV)/bin/mypy

format: $(VENV)/dev.stamp
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build dist *.egg-info covr_fast/_C.*.so

# The environment. torch comes first and pinned: a bare `torch` may bring another build of it.
$(VENV)/torch.stamp: | system
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/%.stamp: $(VENV)/torch.stamp pyproject.toml constraints.txt $(NATIVE)
	$(PY) -m pip install --quiet -c constraints.txt -e '.[$*]'
	touch $@

# A compiler, Python's headers and venv, and the OpenGL libraries that DMControl draws with (libegl1 does not install
# a driver, and Mesa's is the faster one beside a GPU, too).
system:
	@[ -n "$(PYTHON)" ] || { echo "no Python 3.11 or newer found: install one, or name it with PYTHON=..."; exit 1; }
	@missing=""; \
	command -v c++ >/dev/null || missing="$$missing g++"; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
	$(PYTHON) -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
	  || missing="$$missing python3-dev"; \
	for library in libEGL.so.1:libegl1 libOpenGL.so.0:libopengl0; do \
	  $(PYTHON) -c "import ctypes; ctypes.CDLL('$${library%%:*}')" 2>/dev/null || missing="$$missing $${library##*:}"; \
	done; \
	$(PYTHON) -c 'import glob, sys; sys.exit(not any(map(glob.glob, ("/usr/lib/*/dri/*_dri.so", "/usr/lib*/dri/*_dri.so"))))' \
	  || missing="$$missing libgl1-mesa-dri"; \
	if [ -n "$$missing" ]; then \
	  run=""; [ "$$(id -u)" = 0 ] || run=sudo; \
	  echo "installing system packages:$$missing"; \
	  $$run apt-get -qq update && $$run apt-get -qq install -y $$missing >/dev/null \
	    || { echo "please install these packages, then run make again:$$missing"; exit 1; }; \
	fi
