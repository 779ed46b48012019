# make train and make test start from nothing but Python 3.10 or newer: each creates the environment it needs.
# Overridable on the command line: make test ENV=/path/to/environment PYTHON=python3.12 ARGS="-k order"
# (ENV is not taken from the process's environment, where some systems keep another variable of that name.)

ENV    := .venv
PYTHON ?= python3
ARGS   ?=
WORKERS ?= 2
# As many workers as cores: threads of each would wait for one another.
PYTEST  := OMP_NUM_THREADS=1 $(ENV)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal

INSTALLED := $(ENV)/.installed
RUN       := $(ENV)/bin/python

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help environment train test test-slow lint format types imports docs check bench gpu clean

help:  ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

environment: $(INSTALLED)  ## Create the environment, or bring it up to date

train: data/shapes  ## Pre-train on the embedded data set and evaluate (ARGS="overrides")
	$(RUN) -m mmpretrain.train experiment=quickstart $(ARGS)

test: $(INSTALLED)  ## Run the fast tests (ARGS="arguments of pytest")
	@$(PYTEST) $(ARGS)

test-slow: $(INSTALLED)  ## Run the tests that take minutes
	@$(PYTEST) -m slow $(ARGS)

lint: $(INSTALLED)  ## Check style and layout
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check

format: $(INSTALLED)  ## Fix what lint can fix
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

types: $(INSTALLED)  ## Check types
	$(RUN) -m mypy

imports: $(INSTALLED)  ## Check the import contracts
	$(ENV)/bin/lint-imports --no-logo

# -E: pages kept from a build that failed would not be checked again.
docs: $(INSTALLED)  ## Build the documentation in docs/_build/html; a broken link or a stale reference fails
	$(RUN) docs/generate.py --check
	$(RUN) -m sphinx -E -a -W --keep-going -n -q docs docs/_build/html

check: lint types imports docs test test-slow  ## Run all of these checks

bench: $(INSTALLED)  ## Run the benchmarks that fit two cores in a quarter of an hour (ARGS="arguments")
	$(RUN) -m analysis.benchmarks $(ARGS)

gpu: $(INSTALLED)  ## Run the CUDA tests and benchmarks on a GPU (ARGS="--minutes 25")
	$(RUN) -m analysis.benchmarks.gpu --output bench/gpu $(ARGS)

clean:  ## Remove the environment, caches and builds; keep data and runs
	rm -rf .venv build dist docs/_build .import_linter_cache .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -path ./data -prune -o -path ./runs -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# Built beside and renamed, so that an interrupted build is never taken for a whole one.
data/shapes: | $(INSTALLED)
	@rm -rf $@.partial
	$(RUN) -m data_tools shapes --output $@.partial
	@mv $@.partial $@

$(INSTALLED): pyproject.toml setup.py constraints.txt
	@command -v $(PYTHON) > /dev/null || { \
		echo "make: $(PYTHON) was not found: install Python 3.10 or newer (Debian, Ubuntu: sudo apt install python3 python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "make: $(PYTHON) is $$($(PYTHON) --version), but 3.10 or newer is needed: name another with make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
		echo "make: $(PYTHON) cannot create environments: install its venv module (Debian, Ubuntu: sudo apt install python3-venv)" >&2; exit 1; }
	@echo "Installing into $(ENV): a few minutes the first time."
	$(PYTHON) -m venv $(ENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
