# `make help` lists the targets. Variables: PYTHON (3.11 to 3.13), VENV, EXTRAS, PYTEST_ARGS.

VENV ?= .venv
BIN := $(VENV)/bin
# Of the environment that there is; a name that is given has to mean the same version.
PYTHON ?= $(firstword $(wildcard $(BIN)/python) python3)
# PyTorch serves the parity tests alone and is tested on Python 3.11; without it they are skipped.
EXTRAS ?= $(shell $(PYTHON) -c 'import sys; print("dev,export,cloud,torch" if sys.version_info[:2] == (3, 11) else "dev,export,cloud")')
# In the order of the files: by their number of tests, the slow ones with few would come last.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
# For suites whose tests mostly wait for processes that they start.
TWO_AT_ONCE := -n 2 --dist load

comma := ,
space := $(subst ,, )
# What the fast suite leaves out; each has a target.
MARKS := commands parity fault multiprocess object_store slurm browser installed export real_data
INSTALLED := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
PYTEST := $(BIN)/python -m pytest
SOURCES := duc_dlc_jax configs examples tests

# Compiled programs are kept between runs; tests compile many small ones, hence no minimum time.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: help same-python install demo test test-commands test-parity test-fault test-multiprocess test-object-store test-slurm test-browser test-installed test-export test-real-data test-all conversion lint format bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 20

install: $(INSTALLED)  ## create the virtual environment with the tested versions

same-python:
	@test ! -x $(BIN)/python || $(BIN)/python -c 'import sys; own = "%d.%d" % sys.version_info[:2]; asked = sys.argv[1]; sys.exit(own != asked and f"$(VENV) is Python {own}, $(PYTHON) is {asked}: make VENV=.venv{asked} PYTHON=$(PYTHON) ..., or remove $(VENV)")' "$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')"

$(INSTALLED): pyproject.toml constraints.txt | same-python
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Python {v[0]}.{v[1]} is not supported: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@rm -f $(VENV)/.installed-*
	@touch $@

demo: install  ## draw street scenes, train a small network on them, evaluate it
	$(BIN)/python -m duc_dlc_jax.data.prepare --dataset=scenes --data_dir=data
	$(BIN)/python -m duc_dlc_jax.main --config=configs/demo.py --workdir=runs/demo

test: install  ## the fast suite
	$(PYTEST) -m "not ($(subst $(space), or ,$(MARKS)))" $(PYTEST_ARGS)

test-commands: install  ## fit, surgery, ablate and benchmark, which train and evaluate
	$(PYTEST) -m commands $(PYTEST_ARGS)

test-parity: install  ## the deep and wide networks against PyTorch
	$(PYTEST) -m parity $(PYTEST_ARGS)

test-fault: install  ## runs that are killed and resume
	$(PYTEST) -m fault $(TWO_AT_ONCE)

test-multiprocess: install  ## several processes as one run
	$(PYTEST) -m multiprocess

test-object-store: install  ## workdir and records on S3 and Google stores of this machine
	$(PYTEST) -m object_store $(TWO_AT_ONCE)

test-slurm: install  ## jobs of a real Slurm; needs slurm-wlm, munge and root
	$(PYTEST) -m slurm

test-browser: install  ## the report; needs the programs chromium and chromedriver
	$(PYTEST) -m browser

test-installed: install  ## the built wheel; DUC_DLC_OTHER_PYTHON: checkpoints of two versions
	$(PYTEST) -m installed

test-export: install  ## deep networks as bundles, and the C++ example: needs cmake and a compiler
	$(PYTEST) -m export

test-real-data: install  ## needs DUC_DLC_SHARED_DATA, see CONTRIBUTING.md
	$(PYTEST) -m real_data

test-all: test test-commands test-parity test-fault test-multiprocess test-object-store test-slurm test-browser test-installed test-export test-real-data  ## every suite

conversion: SHELL := /bin/bash
conversion: .SHELLFLAGS := -o pipefail -c
conversion: install  ## the rows of the matrix in docs/conversion.md
	@$(PYTEST) -q -s -m "parity or export" tests/test_layouts.py tests/test_import_model.py tests/test_export_deep.py | grep -E "^(\||FAILED|ERROR)"

lint: install  ## ruff and pyright
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/pyright --pythonpath $(BIN)/python

format: install  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: install  ## images per second of a training step and of inference
	$(BIN)/python -m duc_dlc_jax.benchmark --config=configs/demo.py

clean:  ## remove caches and build products; keeps the virtual environment, data and runs
	rm -rf .cache .pytest_cache .ruff_cache build dist
