# make demo and make test each set up a fresh machine: a .venv in the checkout with everything the tests use.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.moec-installed
# For pip, such as an index of CPU builds of torch: make setup PIP_ARGS='--index-url URL'
PIP_ARGS ?=
# For pytest, such as one file: make test PYTEST_ARGS=tests/cli/test_opt.py
PYTEST_ARGS ?=
# On 2 cores two processes took 6 minutes where one took 10.
PYTEST := $(PY) -m pytest -n auto --maxprocesses 8

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-oldest lint format bench clean

help: ## what there is to make
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

setup: $(STAMP) ## create .venv and install moec with every extra

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "moec needs Python 3.11 or newer; name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once; some minutes on a fresh machine)"
	@$(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -e '.[dev]'
	@touch $@

demo: $(STAMP) ## compile a really trained small MoE and show everything
	$(PY) -m moec demo

test: $(STAMP) ## the tests, without the long matrices
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: $(STAMP) ## the tests with the long matrices
	$(PYTEST) $(PYTEST_ARGS)

# The oldest Triton that pyproject.toml allows, in front of the environment; its interpreter needs a numpy of its time.
OLDEST := .oldest
$(OLDEST)/.installed: pyproject.toml
	$(PY) -m pip install -qq --disable-pip-version-check --no-deps --upgrade --target $(OLDEST) $(PIP_ARGS) triton==3.6.0 numpy==2.3.5
	@touch $@

test-oldest: $(STAMP) $(OLDEST)/.installed ## the kernels under the oldest Triton
	PYTHONPATH=$(OLDEST) $(PYTEST) tests/backends/triton $(PYTEST_ARGS)

lint: $(STAMP) ## ruff, mypy --strict, the layers
	@failed=; for tool in "ruff check" "ruff format --check" mypy lint-imports; do \
		echo "== $$tool"; $(VENV)/bin/$$tool || failed=1; done; test -z "$$failed"

format: $(STAMP) ## what ruff can mend by itself
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

bench: $(STAMP) ## before/after latency of a transformers Mixtral layer and model
	$(PY) -m moec bench examples/generate_mixtral.py:build

clean: ## everything that was made here, .venv included
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
