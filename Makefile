# `make run` and `make test` do all set-up. The environment lives in .venv.
.DEFAULT_GOAL := help
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A run never installs anything by itself, and asks no one for updates.
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_TELEMETRY_ENABLED := 0
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help install run test test-slow lint options speed constraints clean

help:
	@echo "make run     federated fine-tuning of the default job, from nothing"
	@echo "make test    the tests (make test-slow: those that take minutes)"
	@echo "make lint    ruff, mypy, and the contracts of imports between packages"

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv -c constraints.txt
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --compile-bytecode -e '.[dev]' -c constraints.txt
	touch $(READY)

run: $(READY)
	$(BIN)/d2ft run

# Two processes: the tests of Flower, which tests/conftest.py puts first, mostly wait for others.
test: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

# After a change of an option: its comment in pyproject.toml, and docs/options.md.
options: $(READY)
	$(BIN)/python -m d2ft_fl.cli.options_page

# The speed tables of README, on this machine: three quarters of an hour in which nothing else may run.
speed: $(READY)
	$(BIN)/python experiments/speed/measure.py

constraints: $(READY)
	$(BIN)/uv pip compile --quiet --python-version 3.11 --extra dev --no-header --no-annotate \
		--no-emit-index-url --output-file constraints.txt pyproject.toml

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
