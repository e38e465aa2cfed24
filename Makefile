# Everything happens in .venv, which is made on first use and again when the pins change.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check sanitize format bench clean

help:  ## What there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# torch goes first and alone, at its pin: with nothing installed, the looser requirement of another
# package could fetch another build of it, gigabytes with CUDA.
.venv/ready: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/ready  ## Compare a network with and without batch norm on MNIST, ten seeds each
	$(BIN)/normlab compare

# Threads of one process that wait in a loop would keep the other's from working.
test: .venv/ready  ## The test suite, in two processes
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 -m 'not slow'

test-slow: .venv/ready  ## The tests that take minutes
	$(BIN)/python -m pytest -m slow

check: .venv/ready  ## Format, lint, types, floors
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

sanitize: .venv/ready  ## The kernels under address and thread sanitizers; needs clang and libomp-dev
	$(BIN)/python scripts/sanitize.py

format: .venv/ready  ## Put the code into form
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: .venv/ready  ## What is timed, as ratios against named peers
	$(BIN)/normlab bench layers
	$(BIN)/normlab bench fleet

clean:  ## Take .venv and caches away
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
