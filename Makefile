# Everything runs in .venv, made on first use. `make` alone prints the targets.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Tried in order; PYTHON=/path/to/python names another one.
CANDIDATES := $(or $(PYTHON),python3 python3.13 python3.12 python3.11)
# One JAX process per core, at most four: each compiles for itself and needs memory.
TEST_FLAGS := -n logical --maxprocesses 4 --dist worksteal

# OpenBLAS threads spin while they wait; small factorisations are better off alone.
export OPENBLAS_NUM_THREADS := 1
# Large arrays in huge pages, where Linux offers them on request: with pages of 4 kB
# touching new memory for the first time can take longer than the arithmetic on it.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-all lint bench notebooks docs clean

help: ## list the targets
	@echo "make TARGET   (needs Python 3.11 or newer; PYTHON=... picks one for $(VENV))"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## run the demonstration: python -m sparserec
	@$(BIN)/python -m sparserec

test: $(VENV)/.test ## run the tests, without the slow ones
	@$(BIN)/python -m pytest $(TEST_FLAGS)

test-all: $(VENV)/.test ## run every test, the slow ones too
	@$(BIN)/python -m pytest $(TEST_FLAGS) -m ""

lint: $(VENV)/.dev ## check style, formatting and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright

bench: $(VENV)/.test ## run every benchmark in benchmarks/
	@for file in benchmarks/[a-z]*.py; do \
	  name=benchmarks.$$(basename "$$file" .py); \
	  echo "== python -m $$name"; \
	  $(BIN)/python -m "$$name" || exit 1; \
	done

notebooks: $(VENV)/.docs ## run the notebooks and write their outputs
	@$(BIN)/python notebooks/_build.py

docs: $(VENV)/.docs $(VENV)/.test ## run the code of the pages, build docs/_build/html
	@$(BIN)/python -m pytest -q $(TEST_FLAGS) -m slow tests/test_docs.py
	@$(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

clean: ## remove the environment, caches and build products
	@rm -rf $(VENV) build dist docs/_build *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps below are newer than pyproject.toml when their extras are installed.
$(BIN)/python:
	@for candidate in $(CANDIDATES); do \
	  version=$$("$$candidate" --version 2>/dev/null) || version='does not run'; \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	      2>/dev/null; then \
	    echo "Creating $(VENV) with $$version"; \
	    "$$candidate" -m venv --clear $(VENV) && exit 0; \
	    rm -rf $(VENV); \
	    echo "error: '$$candidate -m venv' failed, see above." >&2; \
	    exit 1; \
	  fi; \
	  echo "$$candidate: $$version (needs Python 3.11 or newer)" >&2; \
	done; \
	echo "error: sparserec needs Python 3.11 or newer;" \
	  "name one with: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; \
	exit 1

define install
	@echo "Installing sparserec[$(1)] into $(VENV) (the first time takes minutes)"
	@$(PIP) install -qq --editable '.[$(1)]'
	@touch $@
endef

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(call install,demo)

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(call install,test)

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(call install,docs)

# On top of the test tools, because pyright reads the tests as well.
$(VENV)/.dev: $(VENV)/.test
	$(call install,dev)
