# Two commands do everything on a fresh machine: `make demo` and `make test`. Both set themselves up in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
LINKS  := aggregation client crypto server simulation

export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1

.PHONY: help demo test test-slow test-browser check lint types links bench clean

help:
	@echo "make demo       ten sites, two poisoned, five runs side by side: a table and a picture in demo-out/"
	@echo "make test       the tests (under 10 minutes on 2 cores)"
	@echo "make test-slow  the long ones: Ray, real SuperLink and SuperNodes, chaos, refusals, two federations"
	@echo "make test-browser   the lab's report in Chromium"
	@echo "make check      what CI runs: lint, types, vectors, tests, browser"
	@echo "make bench      the benchmarks behind docs/performance.md"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[simulation,ray,dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/quorsum demo --out demo-out

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Static tools do not see that setuptools maps the top-level folders into the package; these links show them.
links:
	@for room in $(LINKS); do ln -sfn ../$$room quorsum/$$room; done

test-browser: $(STAMP)
	$(BIN)/python -m pytest -m browser

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) links
	$(BIN)/mypy

check: lint types test test-browser

bench: $(STAMP)
	$(BIN)/python benchmarks/suites.py
	$(BIN)/python benchmarks/exact_gram.py
	$(BIN)/python benchmarks/agreement.py
	$(BIN)/python benchmarks/federation.py
	$(BIN)/python benchmarks/hiding.py

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out $(addprefix quorsum/,$(LINKS))
