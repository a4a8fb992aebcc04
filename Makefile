# `make demo` and `make test` are all a new machine with Python >= 3.11 and pip needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO ?= demo
DEMO_ARGS ?=
TEST_ARGS ?=

.PHONY: demo test test-slow lint install clean

demo: $(VENV)/.installed
	$(BIN)/clipmill demo --out $(DEMO) $(DEMO_ARGS)

test: install lint
	$(BIN)/python -m pytest -m "not slow and not gpu" $(TEST_ARGS)

test-slow: install
	$(BIN)/python -m pytest -m "slow and not gpu" $(TEST_ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# With the tools and all optional packages that the tests use; `make demo` does without them.
install: $(VENV)/.dev

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) -e ".[dev]"
	touch $@

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), f'Python >= 3.11 is needed, this is {sys.version}'"
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
