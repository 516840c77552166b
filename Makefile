VENV ?= .venv
BIN := $(VENV)/bin
PACKAGES := data_conversion planners trainers pipeline

.PHONY: install lint type test test-all demo clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow the editable install's folder mapping; this link shows it the package.
type: install
	mkdir -p .typecheck
	ln -sfn .. .typecheck/nnmosaic
	MYPYPATH=.typecheck $(BIN)/mypy --explicit-package-bases $(PACKAGES:%=-p nnmosaic.%)

test: install
	$(BIN)/python -m pytest -q

test-all: lint type test

demo: install
	$(BIN)/python examples/hippocampus/demo.py --output demo_output

clean:
	rm -rf $(VENV) build demo_output .typecheck .mypy_cache .pytest_cache .ruff_cache *.egg-info
