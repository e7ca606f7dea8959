# Each target sets up what it needs in .venv; nothing else of the machine is touched.
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON_FILES := src tests benchmarks
READY := $(VENV)/.ready
SOURCES := pyproject.toml constraints.txt CMakeLists.txt tools/setup.sh $(shell find csrc -type f)

.PHONY: demo test test-all lint format bench wheel gpu-check clean help

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): $(SOURCES)
	VENV=$(VENV) tools/setup.sh

demo: $(READY) ## train and measure the whole cascade on the built-in data; writes runs/demo/report.html
	$(BIN)/recfast run --out runs/demo

test: $(READY) ## every test that takes less than ten seconds
	$(BIN)/python -m pytest -m "not slow"

test-all: $(READY) ## the slow tests too
	$(BIN)/python -m pytest

lint: $(READY) ## style and mistakes
	$(BIN)/ruff check $(PYTHON_FILES) && $(BIN)/ruff format --check $(PYTHON_FILES)

format: $(READY) ## rewrite the Python files in house style
	$(BIN)/ruff check --fix $(PYTHON_FILES) && $(BIN)/ruff format $(PYTHON_FILES)

bench: $(READY) ## the benchmarks of every op, one thread and all
	$(BIN)/python -m pytest benchmarks

wheel: $(READY) ## build dist/*.whl
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist .

gpu-check: $(READY) ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

clean: ## remove what was built, keep runs/
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .benchmarks
