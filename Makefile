# make up: a deployment from nothing. make lint, make test-all: what CI runs. Everything lives in .venv and build/.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
# Further arguments for the installation of torch, such as --index-url https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
TORCH := torch==2.13.0
# Arguments for `elasticmoe up`, such as --port 9000 --replicas 1
UP ?=
# Arguments for pytest, such as -k launcher
ARGS ?=
# Files in their order: those with processes, which take longest, come first, and short ones fill the end of both halves.
HALVES := -n 2 --dist loadfile --no-loadscope-reorder

BIN := .venv/bin
# Quiet but for the bars of downloads.
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet --progress-bar on
STAMP := .venv/.installed
NATIVE := $(shell find native -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt)
CPP := $(filter %.cpp %.h,$(NATIVE))
# An editable install knows modules by their files: it is made anew where one has come, moved or gone.
MODULES := .venv/.modules
MODULES_NOW := $(shell find common services cli native -name '*.py' | LC_ALL=C sort | cksum)
MODULES_CHANGED :=
ifneq ($(MODULES_NOW),$(shell cat $(MODULES) 2>/dev/null))
MODULES_CHANGED := modules-changed
endif
# Tools of the virtual environment (cmake, ninja, ctest) come first.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help modules-changed install up down test test-all test-fast test-hostile test-sim accel accel-test accel-standin soak lint format docs picture screenshots native-test bench compose-test images-test clean

help:
	@echo 'install       virtual environment with everything; fast when nothing changed'
	@echo 'up            serve the demo model at http://127.0.0.1:8000/v1 until Ctrl-C (UP="--port 9000")'
	@echo 'down          stop the deployment of the default run directory'
	@echo 'test          all tests but the slow ones and those that need a container engine (ARGS="-k launcher")'
	@echo 'test-all      the slow ones too: what CI runs'
	@echo 'test-hostile  what test runs, beside busy loops, with odd descriptors, another umask, as nobody (ARGS="busy user")'
	@echo 'test-fast     unit tests and the simulation'
	@echo 'accel-standin whole deployments on stand-ins of NPUs and GPUs (an hour; by hand: tests/devices/with_standins.py)'
	@echo 'test-sim      the simulation alone: all cores in one thread, 1,250 seeds (one: python -m tests.sim SEED)'
	@echo 'accel-test    the tests of backends, devices and deployments on a GPU that is there'
	@echo 'accel         what accelerators here do: memory, parity, the oracle, benchmarks (STANDIN=npu: without one)'
	@echo 'soak          half an hour of load, random faults and random resizes (ARGS="--seed 7 --minutes 60")'
	@echo 'lint          ruff, mypy, clang-format, house rules'
	@echo 'format        rewrite sources as lint wants them'
	@echo 'docs          write docs/reference from the code'
	@echo 'picture       record docs/picture.svg from a deployment of the demo model'
	@echo 'screenshots   pictures of the web page: a running deployment with load, in docs/page (needs chromium and chromedriver)'
	@echo 'native-test   C++ unit tests, plain and with sanitizers (ARGS="plain asan tsan")'
	@echo 'bench         steady-state benchmark (ARGS="--models demo")'
	@echo 'compose-test  compose.yaml for real; needs a container engine'
	@echo 'images-test   the images for accelerators but for the vendors parts; needs a container engine'
	@echo 'clean         remove what was built; .venv stays'

install: $(STAMP)

$(STAMP): pyproject.toml CMakeLists.txt $(NATIVE) $(MODULES_CHANGED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$$($(PYTHON) --version) is too old: 3.11 or newer is needed (make PYTHON=python3.12)" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo 'no C++ compiler: install g++ or clang++ with C++20' >&2; exit 1; }
	@echo '[1/4] the virtual environment .venv, and pip'
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	@$(PIP_INSTALL) --upgrade pip
	@echo '[2/4] $(TORCH): the largest download'
	@$(PIP_INSTALL) $(TORCH_INDEX) '$(TORCH)'
	@echo '[3/4] cmake and ninja'
	@$(PIP_INSTALL) 'cmake>=3.25' ninja
	@echo '[4/4] the other packages; compiles the native modules, which takes about a minute the first time'
	@$(PIP_INSTALL) --editable '.[test,lint,bench,otel]'
	@echo 'installed in .venv'
	@echo '$(MODULES_NOW)' > $(MODULES)
	@touch $@

modules-changed:

up: install
	$(BIN)/elasticmoe up --model demo $(UP)

down: install
	$(BIN)/elasticmoe down

test: install
	$(BIN)/python -m pytest -m 'not compose and not slow' $(HALVES) $(ARGS)

test-all: install
	$(BIN)/python -m pytest -m 'not compose' $(HALVES) $(ARGS)

test-fast: install
	$(BIN)/python -m pytest tests/unit tests/sim tests/test_tidy.py -m 'not slow' -n 2 $(ARGS)

test-hostile: install
	$(BIN)/python -m tests.hostile $(ARGS)

ON_ACCELERATORS := tests/procs/test_scale.py::test_50_random_resizes_under_32_streams_are_exact \
  $(addprefix tests/procs/,test_oracle.py test_kill_matrix.py test_device_loss.py test_restarts.py)

# Whole deployments on stand-ins of accelerators' drivers, compiled against the vendors' declarations.
accel-standin: install
	$(BIN)/python -m pytest -m 'not soak and not compose or accel' -n 0 $(ARGS) tests/unit/test_devices_*.py \
	  tests/procs/test_devices_lifetimes.py tests/procs/test_hmm_accelerators.py tests/procs/test_accelerators.py \
	  tests/procs/test_bench_accel.py tests/unit/test_triton_kernels.py
	for kind in npu cuda; do \
	  $(BIN)/python -m pytest -m 'not soak' -n 0 --accelerator $$kind $(ARGS) $(ON_ACCELERATORS); \
	done

# What is measured is the environment that is there, with the torch that its owner has chosen for the device: these two
# install nothing.
IS_INSTALLED = [ -x $(BIN)/elasticmoe ] || { echo 'there is no $(BIN)/elasticmoe: install a torch for the device and this package into .venv \
  (docs/ascend.md and docs/cuda.md, Install), or, for stand-ins alone, run make install' >&2; exit 1; }

# Where there is no accelerator it says so in one line, and fails. STANDIN=npu or cuda: on the stand-in of a driver, which
# proves the runner and measures nothing of a device.
accel:
	@$(IS_INSTALLED)
	$(if $(STANDIN),$(BIN)/python -m tests.devices.with_standins $(STANDIN)) $(BIN)/elasticmoe bench accel \
	  $(if $(STANDIN),--devices $(STANDIN):0-1 --device-memory 256MiB --sized-model tiny-qwen3-moe \
	    --output-tokens 16 --output build/accel) $(ARGS)

# On the first GPU of this machine, with a build of torch for it: compute backends, the contract of devices and whole
# deployments, by the tests that all of them have to pass.
accel-test:
	@$(IS_INSTALLED)
	$(BIN)/python -m pytest -p tests.hardware.plugin -n 4 $(ARGS) tests/unit/test_devices_rules.py \
	  tests/unit/test_backends.py tests/unit/test_backends_attention.py tests/unit/test_sampler.py \
	  tests/unit/test_sampling_extremes.py tests/unit/test_model_parity.py tests/unit/test_oracle_model.py \
	  tests/unit/test_tensor_parallel.py
	$(BIN)/python -m pytest --hardware triton -n 4 $(ARGS) tests/procs/test_oracle.py tests/procs/test_kill_matrix.py \
	  $(addprefix tests/procs/test_scale.py::test_,50_random_resizes_under_32_streams_are_exact \
	  random_resizes_of_ranks_that_compute_with_torch_are_exact)
	$(BIN)/python -m tests.hardware.rules

test-sim: install
	$(BIN)/python -m pytest tests/sim $(ARGS)

soak: install
	$(BIN)/elasticmoe chaos --minutes 30 $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p elasticmoe
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/python -m pytest -q tests/test_tidy.py

format: install
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

docs: install
	$(BIN)/python -m scripts.reference

picture: install
	@$(PIP_INSTALL) 'pyte>=0.8,<1'
	$(BIN)/python -m scripts.picture

screenshots: install
	$(BIN)/python -m scripts.screenshots $(ARGS)

native-test: install
	bash native/run_tests.sh $(ARGS)

bench: install
	$(BIN)/elasticmoe bench serve $(ARGS)

images-test:
	bash deploy/images_test.sh

compose-test:
	bash deploy/compose_test.sh

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis $(STAMP)
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
