# `make run` and `make test` set everything up themselves; the rest is for developers.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.PHONY: help install install-dev install-ray run test test-slow lint types floors check format proto docs clean
.PHONY: promises audit sbom
.PHONY: build build-cuda build-test-image integration-tests

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

install-ray: $(VENV)/.installed-dev ## The same, with Ray for its slow tests
	$(PIP) --editable ".[ray]"

run: install ## Serve the demo model, or MODEL_NAME, on gRPC 8033 and HTTP 3000
	@exec $(BIN)/tgis serve

test: install-dev ## Run the quick tests
	$(BIN)/python -m pytest -m "not slow"

test-slow: install-dev ## Run the slow tests, or those of TESTS
	$(BIN)/python -m pytest -m slow --timeout 1800 $(TESTS)

PROMISES := core_killed core_stopped poisoned_request cancelled_streams slow_readers overload \
	drain hostile_wire supply_chain soak

promises: install-dev ## Measure every promise of docs/reliability.md in full, about two hours
	for name in $(PROMISES); do $(BIN)/python -m tests.promises.$$name --full --save || true; done
	$(BIN)/python -m tests.promises.report

$(VENV)/.installed-supply: pyproject.toml | $(VENV)/.installed
	$(PIP) --editable ".[supply]"
	@touch $@

audit: $(VENV)/.installed-supply ## Look the locked packages up in the database of vulnerabilities
	$(BIN)/pip-audit $(addprefix --requirement ,$(wildcard deploy/requirements*.txt)) --no-deps --disable-pip --strict

sbom: $(VENV)/.installed-supply ## Write build/sbom.json, the locked packages in CycloneDX
	@mkdir -p build
	$(BIN)/cyclonedx-py requirements --output-format JSON --output-file build/sbom.json \
		--pyproject pyproject.toml deploy/requirements.txt

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
	$(BIN)/python deploy/generate_prometheus_rule.py

# The container image, with docker or podman. docs/deploy.md says more.
CONTAINER ?= $(notdir $(firstword $(shell command -v docker podman) docker))
IMAGE     ?= text-gen-server:0
TESTS     := cpu-tests:0
COMMIT     = $(shell git rev-parse --short HEAD 2>/dev/null || echo unknown)
EXTRAS    ?=
RELEASE    = $(CONTAINER) build --target server-release --build-arg GIT_COMMIT=$(COMMIT) \
	--build-arg EXTRAS="$(EXTRAS)"

build: ## Build the container image for CPUs, text-gen-server:0 or IMAGE, with EXTRAS such as "ort fms"
	$(RELEASE) --build-arg DEVICE=cpu --tag $(IMAGE) .

build-cuda: ## The same for CUDA devices, with -cuda after its tag
	$(RELEASE) --build-arg DEVICE=cuda --tag $(IMAGE)-cuda .

build-test-image: ## Build the container image that has the tests
	$(CONTAINER) build --target cpu-tests --build-arg DEVICE=cpu --tag $(TESTS) .

# Neither a network nor a file system to write to. TGIS_SHARED names a directory of larger models.
integration-tests: build-test-image ## Run the integration tests in a container
	$(CONTAINER) run --rm --network none --read-only --tmpfs /tmp --tmpfs /home/tgis:mode=0770,uid=2000 \
		$(if $(TGIS_SHARED),--volume $(TGIS_SHARED):/shared:ro --env TGIS_SHARED=/shared) $(TESTS)

clean: ## Remove the environment and all caches
	rm -rf $(VENV) build .mypy_cache .ruff_cache .hypothesis
