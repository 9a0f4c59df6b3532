# Every target sets itself up: a virtual environment in .venv, the package and its tools, at the tested versions.
# The plain pip lines that this stands for are in README.md.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= 2

.PHONY: help install demo test test-gpu lint format bench gpu emulate gates readme clean

help:            ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

install: $(VENV)/.installed  ## create .venv and install the package with all its tools

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fastattn needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "Creating .venv failed. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: install    ## check, compare, train, generate: a report in fastattn-demo/
	$(BIN)/fastattn demo

test: install    ## all tests, on CPU; no GPU needed
	$(BIN)/python -m pytest -n $(JOBS)

test-gpu:        ## the tests that need a GPU; installs nothing, so it works offline
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu tests/gpu tests/core/test_forward_backward.py tests/measure/test_timing.py

lint: install    ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## let ruff rewrite what lint would refuse
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install   ## operator benchmarks on this machine's CPU
	$(BIN)/python -m benchmarks ops --suite cpu

gpu:             ## everything a GPU can tell, in under 9 minutes; installs nothing, so it works offline
	PYTHONPATH=. $(PYTHON) -m benchmarks gpu --out gpu-report

emulate: install ## run the CUDA kernels on an emulated GPU, and plant faults that it has to report
	$(BIN)/python csrc/emulator/emulate.py --faults --jobs $(JOBS)

gates: install   ## compile every kernel, Triton's for four GPU architectures and CUDA's, and check the machine code
	$(BIN)/python -m benchmarks gates
	$(BIN)/python csrc/gates.py --jobs $(JOBS)

readme: install  ## rewrite the tables of README.md from benchmarks/results/
	$(BIN)/python -m benchmarks report --readme README.md

clean:           ## remove what the targets above made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache fastattn-demo gpu-report
