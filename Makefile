# make demo    the main job, from nothing to a report (about five minutes on two cores)
# make test    every test
# make check   what a commit must pass: format, lint, types, the tests that take seconds, floors
# make bench   seconds by phase and peak memory of a PPO update; what the exact KL costs

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT ?= runs/demo
SEED ?= 0

.PHONY: demo test check bench clean

demo: $(READY)
	$(BIN)/kleash demo --out $(OUT) --seed $(SEED)

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff format --check src tests examples benchmarks
	$(BIN)/ruff check src tests examples benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow and not gpu"

bench: $(READY)
	$(BIN)/python benchmarks/ppo_step.py
	$(BIN)/python benchmarks/kl_cost.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
