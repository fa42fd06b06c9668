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
# Tests that share what takes long to make are a group, which runs in one process.
PYTEST := $(PY) -m pytest -n auto --maxprocesses 8 --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-oldest test-legacy test-thirdparty lint format bench clean

help: ## what there is to make
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 24

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

# Older releases of transformers, each in front of the environment, with what they import at their own versions.
LEGACY := .legacy
LEGACY_NEEDS := huggingface_hub==0.36.0 requests==2.32.5 urllib3==2.6.2 charset_normalizer==3.4.4 certifi==2025.11.12 idna==3.11
LEGACY_4.46 := transformers==4.46.3 tokenizers==0.20.3
LEGACY_4.57 := transformers==4.57.3 tokenizers==0.22.1
LEGACY_NEEDS_5 := huggingface_hub==1.5.0 httpx==0.28.1 httpcore==1.0.9 h11==0.16.0 certifi==2025.11.12 idna==3.11 tokenizers==0.22.1
LEGACY_5.0 := transformers==5.0.0
LEGACY_5.8 := transformers==5.8.1
$(LEGACY)/4.%/.installed: Makefile
	$(PY) -m pip install -qq --disable-pip-version-check --no-deps --upgrade --target $(LEGACY)/4.$* $(PIP_ARGS) $(LEGACY_4.$*) $(LEGACY_NEEDS)
	@touch $@
$(LEGACY)/5.%/.installed: Makefile
	$(PY) -m pip install -qq --disable-pip-version-check --no-deps --upgrade --target $(LEGACY)/5.$* $(PIP_ARGS) $(LEGACY_5.$*) $(LEGACY_NEEDS_5)
	@touch $@

test-legacy: $(STAMP) $(patsubst %,$(LEGACY)/%/.installed,4.46 4.57 5.0 5.8) ## older releases of transformers (needs a network once)
	MOEC_LEGACY=4.46 PYTHONPATH=$(LEGACY)/4.46 $(PYTEST) tests/legacy $(PYTEST_ARGS)
	MOEC_LEGACY=4.57 PYTHONPATH=$(LEGACY)/4.57 $(PYTEST) tests/legacy $(PYTEST_ARGS)
	MOEC_LEGACY=5.0 PYTHONPATH=$(LEGACY)/5.0 $(PYTEST) tests/legacy $(PYTEST_ARGS)
	MOEC_LEGACY=5.8 PYTHONPATH=$(LEGACY)/5.8 $(PYTEST) tests/legacy $(PYTEST_ARGS)

# Packages of others that hold MoE layers, and what their layers import; no package's own choice of torch.
THIRDPARTY := .thirdparty
THIRDPARTY_PACKAGES := mixture-of-experts==0.2.3 st-moe-pytorch==0.1.8 soft-moe-pytorch==0.1.9 PEER-pytorch==0.2.2 \
	fairscale==0.4.13 deepspeed==0.19.8 deepctr-torch==0.3.0 torch-rechub==0.9.0 pytorch-mixtures==0.1.5 \
	switch-transformers==0.0.4 litgpt==0.5.13 onnxruntime-genai==0.18.0
THIRDPARTY_NEEDS := einops==0.8.1 einx==0.3.0 frozendict==2.4.7 beartype==0.22.9 CoLT5-attention==0.11.1 local-attention==1.11.2 \
	hyper-connections==0.4.7 absl-py==2.3.1 pandas==2.3.3 python-dateutil==2.9.0.post0 pytz==2025.2 tzdata==2025.2 six==1.17.0 \
	lightning==2.6.1 pytorch-lightning==2.6.1 lightning-utilities==0.15.2 torchmetrics==1.8.2 jsonargparse==4.41.0 psutil==7.2.2 \
	hjson==3.1.0 py-cpuinfo==9.0.0 msgpack==1.1.2 requests==2.32.5 urllib3==2.6.2 charset_normalizer==3.4.4 \
	certifi==2025.11.12 idna==3.11
$(THIRDPARTY)/.installed: Makefile
	DS_BUILD_OPS=0 $(PY) -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --upgrade \
		--target $(THIRDPARTY) $(PIP_ARGS) $(THIRDPARTY_PACKAGES) $(THIRDPARTY_NEEDS)
	@rm -rf $(THIRDPARTY)/tests
	@touch $@

test-thirdparty: $(STAMP) $(THIRDPARTY)/.installed ## MoE layers of packages that nobody here wrote (needs a network once)
	MOEC_THIRDPARTY=1 PYTHONPATH=$(THIRDPARTY) $(PYTEST) tests/thirdparty $(PYTEST_ARGS)

lint: $(STAMP) ## ruff, mypy --strict, the layers
	@failed=; for tool in "ruff check" "ruff format --check" mypy lint-imports; do \
		echo "== $$tool"; $(VENV)/bin/$$tool || failed=1; done; test -z "$$failed"

format: $(STAMP) ## what ruff can mend by itself
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

bench: $(STAMP) ## before/after latency of a transformers Mixtral layer and model
	$(PY) -m moec bench examples/generate_mixtral.py:build

clean: ## everything that was made here, .venv included
	rm -rf $(VENV) $(OLDEST) $(LEGACY) $(THIRDPARTY) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
