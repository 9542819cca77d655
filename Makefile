# `make` lists the targets. They need Python 3.11 or newer and no root; a GPU only where it says so.
#   ARGS=...         further words for the command: make train ARGS='seed=1 train.steps=100'
#   TORCH_INDEX=...  where torch comes from, such as https://download.pytorch.org/whl/cpu
#   PYTHON=...       the interpreter that creates .venv
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=

# An active environment that already has torch is used as it is; otherwise .venv in this folder.
ACTIVE := $(abspath $(or $(VIRTUAL_ENV),$(CONDA_PREFIX)))
HAS_TORCH = import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)
ENV := $(CURDIR)/.venv
ifneq ($(ACTIVE),)
ifneq ($(ACTIVE),$(ENV))
ENV := $(shell $(ACTIVE)/bin/python -c '$(HAS_TORCH)' 2>/dev/null && echo $(ACTIVE) || echo $(ENV))
endif
endif
BIN := $(ENV)/bin
STAMP := $(ENV)/.mar-$(shell echo '$(CURDIR)' | cksum | cut -d' ' -f1)
CPU := OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=''
PYTEST := $(CPU) $(BIN)/python -m pytest -q
# Two processes. The tests of a file stay together, so that what they share is made once; files in order,
# so that no long one is left for the end.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help setup train test test-slow test-all lint format check smoke golden golden-update bench report faults faults-quick gpu compat

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## install everything into .venv, or into the active environment if it has torch

$(STAMP): pyproject.toml constraints.txt
ifeq ($(ENV),$(CURDIR)/.venv)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mar needs Python 3.11 or newer and $(PYTHON) is $$($(PYTHON) --version 2>&1): run make with PYTHON=<a newer one>" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(ENV)
	@echo "1 of 2: torch into $(ENV), the largest download (gigabytes with CUDA; a CPU build by TORCH_INDEX=...)"
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	@echo "2 of 2: mar and its libraries into $(ENV)"
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,eval]'
else
	@echo "1 of 1: mar and its libraries into the active environment $(ENV), whose torch is used"
	$(BIN)/python -m pip install -e '.[dev,eval]'
endif
	@touch $@
	@echo "set up: . $(BIN)/activate, then python -m mar lists the commands"

train: setup ## train on this machine for some minutes; ends with a table
	$(BIN)/python -m mar.train +experiment=medqa $(ARGS)

test: setup ## the tests that take at most 3 minutes on a CPU
	$(PYTEST) $(TWO) -m 'not slow and not gpu' $(ARGS)

test-slow: setup ## the slow tests that need no GPU
	$(PYTEST) $(TWO) -m 'slow and not gpu' $(ARGS)

test-all: setup ## both, in one go: what CI runs
	$(PYTEST) $(TWO) -m 'not gpu' $(ARGS)

lint: setup ## ruff, mypy, the tables against their logs, the kernels compiled for two GPUs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	$(BIN)/python -m mypy
	$(BIN)/python experiments/report.py --check
	! $(BIN)/python -c 'import triton' 2>/dev/null || $(CPU) PYTHONPATH=kernels $(BIN)/python kernels/compile_report.py --check

format: setup ## let ruff fix and format the code
	$(BIN)/ruff check --fix -q .
	$(BIN)/ruff format -q .

smoke: setup ## two real steps of the main job, in a temporary folder
	@out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; \
	$(CPU) $(BIN)/python -m mar.train +experiment=medqa train.steps=2 eval.num_items=16 out="$$out" logger.console=plain

golden: setup ## compare loss values with the committed ones
	$(PYTEST) -m golden

golden-update: setup ## write the golden values and show what changed
	PYTHONPATH=.:kernels $(CPU) $(BIN)/python tests/test_golden.py

bench: setup ## our sampler against transformers.generate (BENCH=--bars: every case)
	$(BIN)/python experiments/bench/sampler.py $(or $(BENCH),--quick)

report: setup ## write the tables of the READMEs from the committed logs
	$(BIN)/python experiments/report.py

faults: setup ## crashes, broken files and, with root, full disks; writes experiments/faults
	$(CPU) $(BIN)/python -m experiments.faults.run $(ARGS)

faults-quick: setup ## those that need no mount, in at most 5 minutes; writes nothing
	$(CPU) $(BIN)/python -m experiments.faults.run --quick $(ARGS)

gpu: ## on a CUDA device, in at most 8 minutes: what only it can measure; installs nothing
	PYTHONPATH=.:kernels:$$PYTHONPATH $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) \
	  experiments/gpu/first_minutes.py $(ARGS)

compat: ## the tests with the versions of experiments/gpu/constraints.txt, in .venv-compat
	$(PYTHON) -m venv .venv-compat
	.venv-compat/bin/python -m pip install -q -c experiments/gpu/constraints.txt -e '.[dev,eval]'
	$(CPU) .venv-compat/bin/python -m pytest -q -n 2 -m 'not slow and not gpu' $(ARGS)

check: lint test-all smoke ## everything that CI runs
