# Targets that need it create .venv first, with the package and its tools at the tested versions. README.md has the
# equivalent commands.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
GPU_JOBS ?= 6
CPP    := $(wildcard $(foreach kind,h cuh cpp cu,csrc/*/*.$(kind) csrc/*/*/*.$(kind)))

.PHONY: help install quick lint format test demo docs tables bench emulate gates ptx sanitize cross \
        proofs hub-kernel sweep test-versions test-gpu test-gpu-cuda test-gpu-triton gpu rehearse fuzz wheel clean

help:            ## list the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 17

install: $(VENV)/.installed  ## create .venv and install the package with all its tools

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fastattn needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "Creating .venv failed. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

quick: install   ## under a minute, after a small change: lint, house rules, and the tests beside the changed files
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .
	$(BIN)/mypy
	$(BIN)/python tests/quick.py --jobs $(JOBS)

lint: install    ## ruff, mypy, and clang-format for csrc/
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(BIN)/clang-format --dry-run -Werror $(CPP)

format: install  ## rewrite what lint refuses: ruff for Python, clang-format for csrc/
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

test: install    ## all tests, on a CPU; no GPU needed. lint and test are what CI runs
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

demo: install    ## check, compare, train, generate: a report in fastattn-demo/
	$(BIN)/fastattn demo

docs: install    ## build the documentation in site/, offline, with warnings as errors
	$(BIN)/python -m sphinx -E -b html -W --keep-going -q docs site

tables: install  ## rewrite the tables of README.md and docs/ from benchmarks/results/ and the import rules
	$(BIN)/python -m benchmarks report --pages README.md docs/performance.md docs/reference/testing.md \
	  docs/guides/train_from_scratch.md
	$(BIN)/python -m tests.project.test_house_rules

bench: install   ## operator benchmarks on this machine's CPU
	$(BIN)/python -m benchmarks ops --suite cpu

emulate: install ## run the CUDA kernels on an emulated GPU, and check that it reports planted faults
	$(BIN)/python csrc/emulator/emulate.py --faults --jobs $(JOBS)

sanitize: install ## run the CPU kernels under the address, undefined behaviour and thread sanitizers
	$(BIN)/python csrc/cpu/check/check.py --sanitize address,undefined --package
	$(BIN)/python csrc/cpu/check/check.py --sanitize thread

cross: install   ## compile the CPU kernels for arm64 and run them under qemu (Debian: g++-aarch64-linux-gnu qemu-user)
	$(BIN)/python csrc/cpu/check/check.py --cross

proofs: install  ## the CUDA kernels' layouts beside CuTe's, their barrier protocols in every order of steps; needs nvcc
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --upgrade --target build/cutlass nvidia-cutlass==4.2.0.0
	$(BIN)/python csrc/proofs/cute.py
	$(BIN)/python csrc/proofs/protocol.py --jobs $(JOBS)

gates: install   ## compile every kernel, Triton's for four GPU architectures and CUDA's, and check the machine code
	$(BIN)/python -m benchmarks gates
	$(BIN)/python csrc/gates.py --jobs $(JOBS)

ptx: install     ## run what Triton compiles for sm_80 and sm_90, and nvcc for sm_90a, on this CPU, and judge the results
	$(BIN)/python -m benchmarks ptx --jobs $(JOBS)

sweep: install   ## compare every family of transformers with eager, and rewrite its page in docs/
	PYTHONPATH=. $(BIN)/python tests/integrations/families.py --jobs $(JOBS) --table docs/guides/transformers_families.md

test-versions:   ## run tests that depend on versions under each supported torch; makes environments of several GB
	$(PYTHON) tests/versions.py --jobs $(JOBS)

GPU_PYTEST = PYTHONPATH=. $(PYTHON) -m pytest -m gpu -n $(GPU_JOBS) --max-worker-restart 50 \
  $(shell $(PYTHON) -c 'import importlib.util as u; print("--timeout 60 --timeout-method thread" if u.find_spec("pytest_timeout") else "")')

fuzz: install    ## check 100,000 random problems on every backend that runs here; after a kill it goes on
	$(BIN)/python -m benchmarks fuzz --problems 100000 --jobs $(JOBS)

wheel: install   ## build sdist and manylinux wheels for x86_64 and aarch64; needs nvcc and g++-aarch64-linux-gnu
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[release]'
	$(BIN)/python release/wheels.py

hub-kernel: install  ## write build/torch-universal, the package in the format of Hugging Face's kernels
	$(BIN)/python release/hub_kernel.py

test-gpu: test-gpu-cuda test-gpu-triton  ## run the tests that need a GPU, in several processes; offline, installs nothing
	$(GPU_PYTEST) tests/core/test_forward_backward.py tests/measure/test_timing.py

test-gpu-cuda:   ## run those of the cuda backend only
	$(GPU_PYTEST) tests/gpu/test_cuda_forward.py tests/gpu/test_cuda_backward.py tests/gpu/test_cuda_decode.py

test-gpu-triton: ## run those of the triton backend only
	$(GPU_PYTEST) tests/gpu/test_triton.py tests/gpu/test_triton_cache.py

gpu:             ## all tests and benchmarks that need a GPU, one report, under 9 minutes; offline, installs nothing
	PYTHONPATH=. $(PYTHON) -m benchmarks gpu --out gpu-report

rehearse: install  ## run the plan of gpu on a simulated GPU, and list what a shorter run would omit
	$(BIN)/python -m benchmarks gpu --rehearse --out gpu-rehearsal

clean:           ## remove the files that the other targets create
	rm -rf $(VENV) .venv-versions build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache fastattn-demo gpu-report gpu-rehearsal
