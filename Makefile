# Every target sets up .venv first; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

.PHONY: demo test test-all lint

# Installs from pyproject.toml; the lock pins every version. The stamp makes a changed file count.
$(VENV)/installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed ($(PYTHON) is older); set PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "error: system package python3-venv is missing (apt-get install python3-venv)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --constraint requirements.lock --editable '.[dev]'
	@touch $@

# `make .venv` sets up and does no more.
.PHONY: .venv
.venv: $(VENV)/installed

test: .venv
	$(BIN)/python -m pytest

test-all: .venv
	$(BIN)/python -m pytest -m "not gpu"

lint: .venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# Makes clips, encodes, trains, samples and scores; a second call goes on where the first stopped.
demo: .venv
	PATH="$(CURDIR)/$(BIN):$$PATH" NUM_CLIPS=$(NUM_CLIPS) STEPS=$(STEPS) SAMPLES=$(SAMPLES) bash tools/demo.sh $(DEMO)

