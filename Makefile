# Everything here runs from a fresh clone: what a target needs is installed into .venv on the way.
# Needed beforehand: Python 3.11 or newer with venv, make, and a C compiler. A GPU is not.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install install-versions demo test test-interpret test-main test-versions versions test-gpu emulate lint format golden budgets wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

install: $(READY)  ## set up .venv (every other target does it when it has to)

# torch goes first and alone: it is by far the largest, and what follows then finds it in place.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llsa_gen needs Python 3.11 or newer, this is %s: make PYTHON=python3.11 ..." % sys.version.split()[0])'
	@echo "Setting up .venv: once, and mostly waiting for torch"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,demo]'
	@touch $@

install-versions: $(READY)  ## unpack the oldest and the newest triton that pyproject.toml admits into .versions
	$(BIN)/python tests/versions.py --install

demo: $(READY)  ## compile spec/llsa_l2.yaml, attend over a photograph, draw what each level keeps
	$(BIN)/python examples/photo/demo.py

test: test-interpret test-main  ## run all tests that need no GPU

test-interpret: $(READY)  ## only the Triton kernels, in Triton's interpreter
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 --dist worksteal -m interpret

test-main: $(READY)  ## all other tests; those for a GPU are shown as skipped without one
	$(BIN)/pytest -n 2 --dist worksteal -m 'not interpret'

test-versions: $(READY)  ## the tests marked versions, with the oldest and the newest triton
	$(BIN)/python tests/versions.py --short

versions: $(READY)  ## every triton from 3.6 and the table of benchmarks/triton_versions.md; the newest of all else, torch too
	$(BIN)/python tests/versions.py
	$(BIN)/python tests/newest.py

test-gpu: $(READY)  ## the tests for a CUDA or ROCm GPU
	$(BIN)/pytest -m gpu

emulate: $(READY)  ## more kernels in Gluon in the emulator of PTX, as for an H100: some minutes, not in CI
	$(BIN)/python tests/emulate.py

lint: $(READY)  ## ruff and pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: $(READY)  ## let ruff sort the imports and lay out the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

golden: $(READY)  ## emit generated/ again from the specs and the templates
	$(BIN)/python -m llsa_gen.emit.golden

budgets: $(READY)  ## measure what every kernel takes of the GPUs it is compiled for: tests/budgets.json, compiled.json
	$(BIN)/python tests/budgets.py

wheel: $(READY)  ## build the wheel into dist/
	$(BIN)/python -m build --wheel --no-isolation

clean:  ## remove what was built and cached here, but not .venv
	rm -rf build dist .hypothesis .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
