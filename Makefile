# `make` lists the targets. Everything needs Python >= 3.11 and no root; nothing needs a GPU unless it says so.
#   ARGS=...         more words for the command, e.g. make train ARGS='seed=1 train.steps=100'
#   TORCH_INDEX=...  the index that torch comes from, e.g. https://download.pytorch.org/whl/cpu
#   PYTHON=...       the interpreter that creates .venv
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=

# An active environment that already has torch is used as it is; otherwise .venv in this folder is ours.
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

.PHONY: help setup train test test-slow lint format check smoke golden golden-update bench report faults faults-quick gpu

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv (or use the active environment, if it has torch) and install everything

$(STAMP): pyproject.toml constraints.txt
ifeq ($(ENV),$(CURDIR)/.venv)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mar needs Python 3.11 or newer and $(PYTHON) is $$($(PYTHON) --version 2>&1): run make with PYTHON=<a newer one>" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(ENV)
	@echo "installing into $(ENV): some minutes the first time"
	$(BIN)/python -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,eval]'
else
	@echo "using the active environment $(ENV) and its torch"
	$(BIN)/python -m pip install -q -e '.[dev,eval]'
endif
	@touch $@

train: setup ## the main job: clinic on this machine, ends with a table (ARGS= for overrides)
	$(BIN)/python -m mar.train +experiment=medqa $(ARGS)

test: setup ## the tests that a CPU does in at most 3 minutes
	$(PYTEST) -n 2 -m 'not slow and not gpu' $(ARGS)

test-slow: setup ## the other tests that need no GPU
	$(PYTEST) -n 2 -m 'slow and not gpu' $(ARGS)

lint: setup ## ruff, mypy, committed tables, and the kernels compiled for two GPUs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	$(BIN)/python -m mypy
	$(BIN)/python experiments/report.py --check
	! $(BIN)/python -c 'import triton' 2>/dev/null || $(CPU) PYTHONPATH=kernels $(BIN)/python kernels/compile_report.py --check

format: setup ## let ruff mend what it can
	$(BIN)/ruff check --fix -q .
	$(BIN)/ruff format -q .

smoke: setup ## two real steps of the main job, in a temporary folder
	@out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; \
	$(CPU) $(BIN)/python -m mar.train +experiment=medqa train.steps=2 eval.num_items=16 out="$$out" logger.console=plain

golden: setup ## the committed loss values come out again
	$(PYTEST) -m golden

golden-update: setup ## write the golden values again and show what changed
	PYTHONPATH=.:kernels $(CPU) $(BIN)/python tests/test_golden.py

bench: setup ## our sampler against transformers.generate (BENCH=--bars: every case)
	$(BIN)/python experiments/bench/sampler.py $(or $(BENCH),--quick)

report: setup ## the tables of the READMEs again, from the committed logs (stale ones fail `make lint`)
	$(BIN)/python experiments/report.py

faults: setup ## faults done for real to small runs; with root also full and read-only disks; writes experiments/faults
	$(CPU) $(BIN)/python -m experiments.faults.run $(ARGS)

faults-quick: setup ## those that need no mount, in at most 5 minutes; writes nothing
	$(CPU) $(BIN)/python -m experiments.faults.run --quick $(ARGS)

gpu: setup ## the tests that need a CUDA device, then what only such a device can measure
	$(BIN)/python experiments/gpu/first_hour.py

check: lint test test-slow smoke golden ## all of it; what CI runs
