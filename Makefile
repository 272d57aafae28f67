# The daily commands. `make help` lists them.

# The newest suitable Python by name; `make PYTHON=/path/to/python3.12 setup` chooses another.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(if $(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo yes),$(name))) python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := torch==2.13.0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format quick bench bench-peers clean

help: ## what each command does
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | awk -F '\t' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(READY) ## everything in .venv, with .venv/bin/armillary (quick when nothing changed)
	@echo "ready: $(BIN)/armillary --help"

# torch first and alone: the package's range then already holds, so pip pulls nothing larger.
$(READY): pyproject.toml
	@.ci/preflight "$(PYTHON)"
	@test -x $(BIN)/python && $(BIN)/python -c 'import pip' 2>/dev/null || "$(PYTHON)" -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@test -x $(BIN)/armillary
	@touch $(READY)

demo: $(READY) ## serve 16 chats with SmolLM2, pre-train a small model, then both chat pages (ONCE=1: exit after the reports)
	$(BIN)/armillary demo $(if $(filter-out 0,$(ONCE)),--once)

lint: $(READY) ## ruff, mypy, and the order of the rings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(READY) ## rewrite the code the way ruff likes it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quick: $(READY) ## the tests that take seconds
	$(BIN)/python -m pytest -m "not slow"

test: $(READY) ## all of CI: Chromium where it may be installed, lint, then every test, slow ones too
	@.ci/chromium
	@$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest --durations=10

bench: $(READY) ## serving on this machine's CPU (wants a quiet machine)
	$(BIN)/python bench/serve_cpu.py

bench-peers: $(READY) ## the same beside transformers, llama.cpp and vLLM (set up by bench/peers/setup.sh)
	$(BIN)/python bench/serve_cpu.py --peers

clean: ## remove .venv and every tool's cache (downloads in the user cache stay)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
