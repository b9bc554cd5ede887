# `make demo` and `make test` are all a newcomer needs; both create the environment in .venv first.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: help demo test install lint types docs table check bench curves clean

help:
	@echo "make demo     train CoLA and its dense twin on two CPU cores and compare them (eight to sixteen minutes)"
	@echo "make test     run the test suite"
	@echo "make docs     build the documentation into build/docs"
	@echo "make table    write the tables of methods, of their combinations and of engines again"
	@echo "make check    lint, types, documentation, tests"
	@echo "make bench    run the benchmarks"
	@echo "make curves   record the first steps of all reproductions again, after a change that should move them"
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

docs: $(STAMP)
	rm -rf build/docs
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -E -W --keep-going -j auto -d build/doctrees -b html docs build/docs
	@echo "open build/docs/index.html"

table: $(STAMP)
	$(BIN)/python docs/pages.py
	PYTHONPATH=. $(BIN)/python tests/contract/test_pairs.py
	PYTHONPATH=. $(BIN)/python tests/contract/engines.py

check: lint types docs test

bench: $(STAMP)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/block_stack.py
	$(BIN)/python benchmarks/trainer_overhead.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/methods.py
	$(BIN)/python benchmarks/gathered.py
	$(BIN)/python benchmarks/loss.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/continual.py
	$(BIN)/python benchmarks/federated.py
	$(BIN)/python benchmarks/ratings.py
	$(BIN)/python benchmarks/optimizers.py
	$(BIN)/python benchmarks/rounding.py
	$(BIN)/python benchmarks/demo_sweep.py
	$(BIN)/python benchmarks/egg_demo.py calendar latin docstrings embedded
	$(BIN)/python benchmarks/matrix_pca.py
	$(BIN)/python benchmarks/first_steps.py spread

curves: $(STAMP)
	$(BIN)/python benchmarks/first_steps.py record

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
