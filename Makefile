# make help lists the targets. PYTHON chooses the interpreter the virtual environment is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# The demo is a sequence of studies, each a chapter: STUDY/PRESET.
DEMO := functa/digits functaset/digits classify/digits dessilbi-mnist/digits vit/digits structural-pruning/digits

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint format bench report clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

install: $(VENV)/.base ## make .venv with the pinned dependencies

demo: $(VENV)/.base ## train on real images, print tables, write figures (about 3 minutes on two cores)
	@for chapter in $(DEMO); do \
	  echo; echo "== $$chapter"; \
	  $(BIN)/python -m experiments run $${chapter%%/*} $${chapter##*/} || exit $$?; \
	done
	@echo; echo "Look at the figures named above; every number is in the result.json beside them."
	@echo "Next:  $(BIN)/python -m experiments list"
	@echo "       $(BIN)/python -m experiments data prepare mnist && $(BIN)/python -m experiments run functa mnist-small"

test: $(VENV)/.dev ## run the tests, but for the slow ones
	$(BIN)/python -m pytest -q -n 2 -m "not slow"

test-all: $(VENV)/.dev ## run all tests (about half an hour on two cores)
	$(BIN)/python -m pytest -q -n 2

lint: $(VENV)/.dev ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.base ## time the inner loops side by side (quiet machine, a few minutes)
	$(BIN)/python -m benchmarks.sine
	$(BIN)/python -m benchmarks.functa_step

report: $(VENV)/.base ## write results/README.md from all finished runs
	$(BIN)/python -m experiments report

clean: ## remove the virtual environment and caches, not the runs
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.base: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) install -e . -c constraints.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) install -e '.[dev]' -c constraints.txt
	@touch $@
