# make demo        everything on the bundled digits: teacher, student, report, checkpoint (about three minutes on two cores)
# make test        the tests (about twelve minutes on two cores);  make test-fast   without the slow ones
# make test-long   every block of README and docs, wrapping of every family of networks (half an hour)
# make test-families   one network of every further family trained, routed, saved and exported (an hour or more)
# make test-browser   the page of `erde-hub demo`; ERDE_HUB_CHROMIUM names the browser
# make lint        formatting, lint and layers;  make types   static types
# make docs        the pages in build/docs; a warning is an error
# Each installs into .venv when it is missing or pyproject.toml has changed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-fast test-long test-families test-browser lint types docs clean

demo: $(VENV)/.train
	$(BIN)/python recipes/distill.py

# Nothing in the tests needs the network: what would reach for it fails at once instead of waiting. One process per core,
# at most four; a file's tests stay together, since some share what they have trained.
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.dev
	$(PYTEST)

test-fast: $(VENV)/.dev
	$(PYTEST) -m "not slow and not long and not families"

test-long: $(VENV)/.dev
	$(PYTEST) -m long

test-families: $(VENV)/.dev
	$(PYTEST) -m families --dist worksteal

test-browser: $(VENV)/.dev
	$(BIN)/pip install --quiet --editable ".[demo]" selenium
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m browser tests/scripts/test_demo_page.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.dev
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs build/docs

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
