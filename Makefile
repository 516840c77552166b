VENV ?= .venv
BIN := $(VENV)/bin
PACKAGES := data_conversion planners trainers pipeline

.PHONY: install lint type test test-all demo demo-raters browser vendor screenshot clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,serve]"
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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto --dist loadfile

test-all: lint type test

demo: install
	$(BIN)/python examples/hippocampus/demo.py --output demo_output

demo-raters: install
	$(BIN)/python examples/retina/demo.py --output demo_retina

# What the test of the page needs besides Chromium and Node.
browser: node_modules/.package-lock.json

node_modules/.package-lock.json: package.json package-lock.json
	npm ci --no-audit --no-fund --ignore-scripts

# NiiVue for the page, from the version in package-lock.json.
vendor: browser
	node pipeline/serve/bundle.mjs

screenshot: install browser
	NNMOSAIC_SCREENSHOT=$(CURDIR)/docs/images/serve.png $(BIN)/python -m pytest -q -k screenshot \
		tests/pipeline/serve/test_page.py

clean:
	rm -rf $(VENV) node_modules build demo_output demo_retina .typecheck .mypy_cache .pytest_cache .ruff_cache *.egg-info
