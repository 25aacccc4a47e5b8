# On a machine with Python (3.10 or newer) and a C++ compiler, `make demo` and `make test` do all set-up in .venv.
#   make test                       all tests, in as many processes as there are cores
#   make test ARGS="-k formats"     arguments for pytest, which then is one process and starts sooner (-n 2: it is two)
#   make setup PYTHON=python3.12    another Python (after make distclean, if .venv exists)
#   make cuda CUDA_ARCHS=80-real    the CUDA kernels compiled for a GPU that need not be there, by a compiler of its own

PYTHON ?= python3
VENV ?= .venv
CUDA_VENV ?= .venv-cuda
CUDA_ARCHS ?= 90a-real
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Threads that wait for work sleep, and numpy's, which spin before they do, aren't there: those of tests side by side, and of
# programs that tests start, would take each other's cores.
PYTEST := OMP_WAIT_POLICY=passive OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest
# A file's tests stay in one process, as its fixtures do; tests/conftest.py says in which order files are handed out. A test
# that kills its process is named and ends the run: a new process would only run into it again.
SIDE_BY_SIDE := --numprocesses logical --maxprocesses 8 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder
CPP_FILES = $(shell find csrc bench tests -name '*.cpp' -o -name '*.hpp' -o -name '*.inl' -o -name '*.cu')
BUILD_FILES := $(shell find csrc third_party -type f -not -path '*/__pycache__/*') CMakeLists.txt pyproject.toml

.PHONY: setup demo docs test test-cuda test-kernels cuda lint format clean distclean

setup: $(VENV)/.stamp-package

demo: setup
	$(BIN)/python examples/demo/run.py $(ARGS)

docs: setup
	$(BIN)/sphinx-build -W --keep-going -q -b html -d build/docs/doctrees docs build/docs/html
	@echo "build/docs/html/index.html"

test: setup
	$(PYTEST) $(or $(ARGS),$(SIDE_BY_SIDE))

test-kernels:
	tests/kernels/run.sh

# The CUDA kernels of every format on the emulator, under sanitizers too; `make test` has one of each kind.
test-cuda: setup
	$(PYTEST) -m "slow or not slow" tests/cuda $(or $(ARGS),$(SIDE_BY_SIDE))

# Beside build/ and not in it, so that ccache finds the CPU's kernels of the module again: paths from there are the same.
cuda: setup $(CUDA_VENV)/.stamp
	PYTHONPATH=tests $(BIN)/python tests/cuda/compile.py $(CUDA_VENV)/cuda/bin build-cuda "$(CUDA_ARCHS)"
	PYTHONPATH=tests $(BIN)/python tests/cuda/oldest_cuda.py $(CUDA_VENV)/cuda/bin build-cuda
	$(PYTEST) -q tests/cuda/test_module.py tests/cuda/test_configure.py tests/cuda/test_launch.py

lint: setup
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/clang-format -i $(CPP_FILES)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build build-cuda dist $(VENV)/.stamp-package

distclean: clean
	rm -rf $(VENV) $(CUDA_VENV)

$(VENV)/.stamp-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "bitfold: $(PYTHON) is no Python 3.10 or newer: install one, and name it with 'make PYTHON=...'." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-requirements: requirements-dev.txt $(VENV)/.stamp-python
	$(PIP) install --no-deps "$$(grep '^torch==' requirements-dev.txt)"
	$(PIP) install -r requirements-dev.txt
	@touch $@

# The packages put CUDA where Python modules lie, and its libraries in lib where nvcc looks in lib64.
$(CUDA_VENV)/.stamp: requirements-cuda.txt $(VENV)/.stamp-python
	$(BIN)/python -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip --disable-pip-version-check --quiet install -r requirements-cuda.txt
	ln -sfn "$$(cd $(CUDA_VENV)/lib/python*/site-packages/nvidia/cu13 && pwd)" $(CUDA_VENV)/cuda
	ln -sfn lib $(CUDA_VENV)/cuda/lib64
	@touch $@

# The Python sources are used in place; the native module is built in build/ and rebuilt when its sources change.
$(VENV)/.stamp-package: $(VENV)/.stamp-requirements $(BUILD_FILES)
	$(PIP) install --no-build-isolation --editable '.[cli,hf]'
	@touch $@
