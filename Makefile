# `make run` and `make test` set everything up themselves; the rest is for developers.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.PHONY: help install install-dev run test test-slow lint types floors check format proto docs clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tgis needs Python 3.11 or newer: make PYTHON=python3.x ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(PIP) --upgrade "pip>=25"
	$(PIP) --editable .
	-$(BIN)/python -m tgis.models.kernels.build
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable ".[dev]"
	@touch $@

install: $(VENV)/.installed ## Prepare the environment in .venv

install-dev: $(VENV)/.installed-dev ## The same, with what tests and linters need

run: install ## Serve the demo model, or MODEL_NAME, on gRPC 8033 and HTTP 3000
	@exec $(BIN)/tgis serve

test: install-dev ## Run the quick tests
	$(BIN)/python -m pytest -m "not slow"

test-slow: install-dev ## Run the slow tests
	$(BIN)/python -m pytest -m slow --timeout 1800

lint: install-dev ## Check style
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: install-dev ## Check types
	$(BIN)/mypy

floors: install-dev ## Check that no module imports from a floor above its own
	$(BIN)/lint-imports

check: lint types floors ## lint, types and floors

format: install-dev ## Format the code
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

proto: install-dev ## Generate the gRPC code from proto/generation.proto
	$(BIN)/python tools/generate_proto.py

docs: install-dev ## Generate the reference pages in docs/
	$(BIN)/python tools/generate_config_docs.py
	$(BIN)/python -m tools.generate_models_docs
	$(BIN)/python tools/generate_dashboard.py

clean: ## Remove the environment and all caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
