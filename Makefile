# The chores of the project; each does its own set-up. `make help` lists them.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD_INPUTS := pyproject.toml setup.py repl/_batches.pyx repl/_slots.pxi repl/edge/_calls.pyx nbd/_batches.pyx \
    nbd/_waiting.pyx
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --use-pep517
SAY_IF_PLAIN := ls repl/_batches.*.so > /dev/null 2>&1 || echo "Installed without compiled loops, as there is no C \
	compiler: everything works, and short requests take up to twice the processor time."
RESULTS := benchmarks/results
PACKAGES := tests/debian-packages.sh
LAB_WORKERS := 4  # guests mostly wait, so more of them than there are cores

.PHONY: help demo migrate-demo test lab sim bench lint docs clean programs

help:  ## This list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed  ## Two mirrored nodes to play with; STORY=1 plays a failover unattended, SEED= repeats one.
	@$(BIN)/python -m tandem.tools.demo $(if $(STORY),--story) $(if $(SEED),--seed $(SEED))

migrate-demo: $(VENV)/.installed  ## A kernel's DRBD pair becomes a Tandem pair and a kernel's again, in use; needs root.
	@$(PACKAGES) tests/debian-packages.txt tests/lab/debian-packages.txt
	@$(BIN)/python -m tests.lab.migrate

test: $(VENV)/.installed-test programs lint  ## Everything: lint, types, all tests; as root also `make lab`.
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal
	@if [ "$$(id -u)" -eq 0 ]; then $(MAKE) --no-print-directory lab; \
	elif [ -n "$${CI:-}" ]; then echo "CI must run the tests against the kernel's DRBD, as root." >&2; exit 1; \
	else echo "The tests against the kernel's DRBD were left out, because they need root: sudo make lab"; fi

lab: $(VENV)/.installed-test  ## Against the kernel's own DRBD in small virtual machines; needs root.
	@$(PACKAGES) tests/debian-packages.txt tests/lab/debian-packages.txt
	TANDEM_LAB=1 TANDEM_LAB_RESULTS=tests/lab/results.json $(BIN)/python -m pytest \
	    --numprocesses $(LAB_WORKERS) --dist worksteal tests/lab

sim: $(VENV)/.installed-test  ## Random runs of the simulator: N= how many, SEED= replays one.
	@$(BIN)/python tests/sim/run.py $(if $(SEED),--seed $(SEED)) $(if $(N),--n $(N))

bench: $(VENV)/.installed-bench  ## Side by side with others, half an hour; QUICK=1 takes under three minutes.
	@$(PACKAGES) benchmarks/debian-packages.txt || echo "The benchmark leaves out what needs them." >&2
	@$(BIN)/python benchmarks/run.py $(if $(QUICK),--quick,--json $(RESULTS)/run.json --table $(RESULTS)/table.txt \
	    --plots $(RESULTS))

lint: $(VENV)/.installed-test  ## ruff, mypy --strict and the rules of the house.
	$(BIN)/ruff check .
	$(BIN)/mypy --strict
	$(BIN)/mypy --strict tests
	cd benchmarks && ../$(BIN)/mypy --strict --config-file ../pyproject.toml *.py
	$(BIN)/python -m pytest --quiet tests/unit/test_tidy.py

docs: $(VENV)/.installed-test  ## Write the tables in docs/ again from the code.
	$(BIN)/python -m tests.doc_tables

$(VENV)/.installed-bench: $(VENV)/.installed-test
	@$(INSTALL) --editable '.[test,bench]'
	@touch $@

clean:  ## Remove the virtual environment and what programs left behind.
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f repl/_batches.*.so repl/edge/_calls.*.so nbd/_batches.*.so nbd/_waiting.*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

programs:
	@$(PACKAGES) tests/debian-packages.txt

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "Python 3.11 or newer is needed; name it with PYTHON=" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	    || { rm -rf $(VENV); echo "No virtual environment; on Debian: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.installed: $(BUILD_INPUTS) | $(VENV)/pyvenv.cfg
	@echo "Installing into $(VENV) ..."
	@$(INSTALL) --editable .
	@$(SAY_IF_PLAIN)
	@touch $@

$(VENV)/.installed-test: $(BUILD_INPUTS) | $(VENV)/pyvenv.cfg
	@echo "Installing into $(VENV), with what the tests need ..."
	@$(INSTALL) --editable '.[test]'
	@$(SAY_IF_PLAIN)
	@touch $@ $(VENV)/.installed
