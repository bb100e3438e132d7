# Everything a fresh machine needs is Python 3.11 or newer (with venv) and make.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help setup test test-slow coverage mutants lint format docs bench sweep demo dist wheel-check clean
.DEFAULT_GOAL := help

help:
	@echo "make setup   install into .venv, with the versions of $(CONSTRAINTS)"
	@echo "make demo    the whole job on real images: search, cut three budgets, retrain, report"
	@echo "make test    the tests (CPU, no network); make test-slow runs the long ones"
	@echo "make coverage   both, measured: fails below the share in pyproject.toml"
	@echo "make mutants    a sample of wrong lines, and whether the tests notice (long)"
	@echo "make lint    ruff and pyright; make format mends what ruff can mend"
	@echo "make docs    the site of docs/, into build/site (links are checked)"
	@echo "make bench   the benchmarks whose results lie in benchmarks/results (long)"
	@echo "make dist    wheel and sdist, into dist, with their metadata checked"
	@echo "make wheel-check   the wheel alone in a fresh environment (network, some GB)"
	@echo "make clean   remove caches and build outputs; runs/ and .venv stay"

setup: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -c $(CONSTRAINTS) -e '.[dev]'
	touch $(STAMP)

# Every process takes whole files, which share what they made; each needs about 2 GB.
# PYTEST_ARGS adds arguments: `make coverage` measures both targets together.
PYTEST_ARGS ?=
PYTEST = $(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile

test: $(STAMP)
	$(PYTEST) $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(PYTEST) -m 'slow and not gpu and not network' $(PYTEST_ARGS)

coverage: $(STAMP)
	$(MAKE) test PYTEST_ARGS='--cov --cov-report= --cov-fail-under=0'
	$(MAKE) test-slow PYTEST_ARGS='--cov --cov-append --cov-report= --cov-fail-under=0'
	$(BIN)/coverage report

mutants: $(STAMP)
	$(BIN)/python -m benchmarks.mutants

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The theme's advertisement for its successor is left out.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open build/site/index.html; for the search: $(PYTHON) -m http.server -d build/site"

bench: $(STAMP)
	$(BIN)/python benchmarks/search_overhead.py
	$(BIN)/python benchmarks/realised_speed.py

# One member of a few families; `python -m benchmarks.coverage` is the whole.
sweep: $(STAMP)
	$(BIN)/python -m benchmarks.coverage --ci --again --output build/sweep

demo: $(STAMP)
	$(BIN)/slimming demo

dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

wheel-check: dist
	.ci/check-wheel

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks recipes -name __pycache__ -type d -prune -exec rm -rf {} +
