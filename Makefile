# make demo   everything on the bundled digits: teacher, student, report, checkpoint (about three minutes on two cores)
# make test   the tests
# make lint   formatting and lint;  make types   static types
# Both of the first two install into .venv when it is missing or pyproject.toml has changed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types clean

demo: $(VENV)/.train
	$(BIN)/python recipes/distill.py

# Nothing in the tests needs the network: what would reach for it fails at once instead of waiting. One process per core,
# at most four; a file's tests stay together, since some share what they have trained.
test: $(VENV)/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.dev
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install -e ".[train]"
	touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@ $(VENV)/.train

clean:
	rm -rf $(VENV) build dist
