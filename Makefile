# `make demo` and `make test` are all a newcomer needs; both create the environment in .venv first.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: help demo test install lint types check bench clean

help:
	@echo "make demo     train CoLA and its dense twin on two CPU cores and compare them (a few minutes)"
	@echo "make test     run the test suite"
	@echo "make check    lint, types, tests"
	@echo "make bench    run the benchmarks"
	@echo "make install  create the environment in .venv"
	@echo "make clean    remove the environment and caches"

install: $(STAMP)

# torch comes first and pinned: asked for without a version, pip may fetch gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lorank needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/lorank demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

check: lint types test

bench: $(STAMP)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/block_stack.py
	$(BIN)/python benchmarks/trainer_overhead.py
	$(BIN)/python benchmarks/methods.py
	$(BIN)/python benchmarks/optimizers.py
	$(BIN)/python benchmarks/demo_sweep.py
	$(BIN)/python benchmarks/egg_demo.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
