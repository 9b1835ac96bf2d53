# Everything runs in a virtual environment here; nothing is installed outside this folder.
PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs
BIN := $(VENV)/bin
# `make test-latest` takes the newest Python that pyproject.toml lists and that runs here.
LATEST_PYTHON ?= $(or $(shell $(PYTHON) .ci/newer_python.py),$(PYTHON))
# A jax version for `make test-latest`; empty for the newest that pyproject.toml allows.
JAX ?=
PYTEST := -m pytest -n auto --dist loadfile
# Without the checks of every call's shapes and types, which `make test` makes.
UNCHECKED := --jaxtyping-packages=
LATEST_VENV := .venv-latest$(JAX:%=-jax-%)

.DEFAULT_GOAL := help
.PHONY: help setup-train setup-test quickstart evidence opd opd-evidence study study-table test test-quick test-all test-latest test-trl test-tunix test-aot bench bench-losses lint structure clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | \
		while IFS='|' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

setup-train: $(VENV)/installed-train  ## install what training needs (no torch)

setup-test: $(VENV)/installed-test  ## install what the tests and linters need

quickstart: $(VENV)/installed-train  ## distil a tiny model, compare with SFT and forward KL
	$(BIN)/python examples/quickstart.py --output $(RUNS)/quickstart

evidence: $(VENV)/installed-train  ## the same with three seeds and all ablations
	$(BIN)/python examples/quickstart.py --output $(RUNS)/evidence --ablations --seeds 0 1 2
	cp $(RUNS)/evidence/evidence.md examples/evidence.md

opd: $(VENV)/installed-train  ## distil arithmetic on policy, compare with four methods
	$(BIN)/python examples/opd.py --output $(RUNS)/opd

opd-evidence: $(VENV)/installed-train  ## the same with three seeds
	$(BIN)/python examples/opd.py --output $(RUNS)/opd-evidence --seeds 0 1 2
	cp $(RUNS)/opd-evidence/opd_evidence.md examples/opd_evidence.md

study: $(VENV)/installed-train  ## compare methods at equal work: hours, goes on after a stop
	$(BIN)/python examples/study.py toy-1000 --output $(RUNS)/study
	$(BIN)/python examples/study.py toy-8000 --output $(RUNS)/study
	$(BIN)/python examples/study.py toy-1000 --budget seconds --output $(RUNS)/study

study-table: $(VENV)/installed-train  ## write docs/study.md from the study's results
	$(BIN)/python examples/study_page.py

test: $(VENV)/installed-test  ## the test suite without the longest tests: minutes
	$(BIN)/python $(PYTEST) -m "not exhaustive"

test-quick: $(VENV)/installed-test  ## the quick tests: for every change
	$(BIN)/python $(PYTEST) -m "not slow"

test-all: test  ## the test suite, then the longest tests
	$(BIN)/python $(PYTEST) $(UNCHECKED) -m exhaustive

test-latest:  ## the quick tests with the newest Python and packages, or with JAX=0.11.2
	$(MAKE) PYTHON="$(LATEST_PYTHON)" VENV=$(LATEST_VENV) PINS=$(JAX:%=jax==%) $(LATEST_VENV)/installed-test
	$(LATEST_VENV)/bin/python --version
	$(LATEST_VENV)/bin/python -m pip list | grep -E '^(jax|jaxlib|flax|optax|orbax-checkpoint|grain|transformers) '
	$(LATEST_VENV)/bin/python $(PYTEST) $(UNCHECKED) -m "not slow"

test-trl:  ## the divergences against TRL's, in an environment of its own
	$(MAKE) VENV=.venv-trl .venv-trl/installed-test-trl
	.venv-trl/bin/python -m pytest tests/peers/test_trl.py

test-tunix:  ## the adapters inside google-tunix, in an environment of its own
	$(MAKE) VENV=.venv-tunix .venv-tunix/installed-test-tunix
	.venv-tunix/bin/python -m pytest tests/integrations

test-aot:  ## the programs under the TPU and GPU compilers, in an environment of its own
	$(MAKE) VENV=.venv-aot .venv-aot/installed-test-aot
	.venv-aot/bin/python -m pytest tests/aot

bench:  ## speed and memory beside torch, transformers and TRL, into benchmarks/RESULTS.md
	$(MAKE) VENV=.venv-bench .venv-bench/installed-bench
	.venv-bench/bin/python benchmarks/run.py

bench-losses: $(VENV)/installed-train  ## what chunked saves and costs, each loss's cost, the import
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/loss_cost.py
	$(BIN)/python benchmarks/loss_memory.py

structure: $(VENV)/installed-test  ## who imports whom
	$(BIN)/python -m pytest tests/test_structure.py

lint: $(VENV)/installed-test  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:  ## remove the environments, the caches and the examples' runs
	rm -rf $(VENV) .venv-latest* .venv-trl .venv-tunix .venv-aot .venv-bench $(RUNS)/quickstart $(RUNS)/evidence $(RUNS)/opd $(RUNS)/opd-evidence .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is not Python 3.11 or newer: name one, as in make PYTHON=python3.12" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp for each extra; it is out of date when pyproject.toml changes.
$(VENV)/installed-%: pyproject.toml | $(BIN)/python
	@echo "installing mgsr_jax[$*] into $(VENV): a few minutes the first time"
	$(BIN)/python -m pip install --quiet --editable '.[$*]' $(PINS)
	touch $@
