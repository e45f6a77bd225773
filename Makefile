# Every target sets up what it needs, once: a virtual environment in .venv and the native build.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# cmake, ninja and the linters of the environment, before those of the machine
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py hulukern/_version.py
# A compiler that comes or goes is a reason to configure again.
NVCC := $(shell command -v nvcc)

.PHONY: bench test test-levels test-asan lint format build clean
bench: $(VENV)/build.stamp
	$(PY) -m bench quick

test: $(VENV)/build.stamp
	$(PY) -m pytest

CPU_TESTS := tests/ops/test_ops.py tests/ops/test_resize.py tests/ops/test_attention_cpu.py -k "cpu or resize"

# The op tests once per CPU level that this machine has.
test-levels: $(VENV)/build.stamp
	for level in baseline avx2 avx512 avx512_bf16 amx; do \
	  HULUKERN_CPU_LEVEL=$$level $(PY) -c "from hulukern.backends import native_error as e; import sys; sys.exit(bool(e()))" || break; \
	  echo "level $$level"; HULUKERN_CPU_LEVEL=$$level $(PY) -m pytest -q $(CPU_TESTS) || exit 1; \
	done

# The op tests of the CPU backend under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the tree.
test-asan: $(VENV)/build.stamp
	rm -rf build/asan && mkdir -p build/asan
	cp -r csrc hulukern tests setup.py CMakeLists.txt pyproject.toml README.md build/asan/
	rm -rf build/asan/hulukern/lib build/asan/hulukern/_C.*
	cd build/asan && HULUKERN_CMAKE_ARGS="-DHULUKERN_ASAN=ON -DHULUKERN_CUDA=OFF" $(abspath $(PY)) setup.py --quiet build_ext --inplace
	cd build/asan && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(shell gcc -print-file-name=libasan.so) $(shell gcc -print-file-name=libubsan.so)" \
	  $(abspath $(PY)) -m pytest -q $(CPU_TESTS)

build: $(VENV)/build.stamp

lint: $(VENV)/build.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	clang-format --dry-run --Werror $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'csrc/*.c')

format: $(VENV)/build.stamp
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	clang-format -i $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'csrc/*.c')

$(VENV)/deps.stamp: pyproject.toml constraints.txt
	@echo "hulukern: setting up $(VENV), once"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools cmake ninja pybind11 torch
	@echo "hulukern: building the native library and installing what tests and benchmarks use"
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

$(VENV)/nvcc.stamp: $(VENV)/deps.stamp FORCE
	@echo "$(NVCC)" | cmp -s - $@ || { rm -rf build/py*; echo "$(NVCC)" > $@; }

$(VENV)/build.stamp: $(VENV)/deps.stamp $(VENV)/nvcc.stamp $(SOURCES)
	$(PY) setup.py --quiet build_ext --inplace
	@$(PY) -c "from hulukern import _C; print('hulukern: CUDA', _C.cuda_archs or 'absent: ' + _C.cuda_absent_reason)"
	@touch $@

.PHONY: FORCE
FORCE:

clean:
	rm -rf build hulukern/_C.* hulukern/lib hulukern/include bench/out $(VENV)/build.stamp
