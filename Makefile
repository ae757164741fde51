# Two commands: `make train`, `make test`; for contributors `make check`. All install what they need first, into
# .venv; `make help` lists the rest.

MODEL ?= deepfm
DATA ?= synthetic
NPROC ?= auto
DATA_ROOT ?=
DEVICE ?=
TORCH_INDEX ?=
ARGS ?=

# PYTHON=… names one; else the first of these from 3.10 on.
CANDIDATES := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10)
RUN := .venv/bin/python -m
FAST := not slow and not cluster and not browser and not spark

.DEFAULT_GOAL := help
.PHONY: help setup train check test style docs clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  make train MODEL=din DATA=ml1m DATA_ROOT=/path/to/data NPROC=2 ARGS='optim.dense.lr=3e-4 epochs=2'"
	@echo "      MODEL, DATA   a file of conf/model, conf/data (deepfm, synthetic)"
	@echo "      DATA_ROOT     where the data lies (data.root)"
	@echo "      NPROC         ranks: a number, or auto: one a GPU, two on a CPU"
	@echo "      ARGS          anything else, as key=value; for make test: pytest's arguments"
	@echo "  make setup DEVICE=cuda          install for GPUs (at first: cpu); also: where make train computes"
	@echo "  make setup TORCH_INDEX=<url>    a further package index to find torch in"
	@echo "  make setup PYTHON=python3.12    the Python to make .venv with (3.10 or newer)"

setup:  ## install into .venv (quick when nothing changed)
	@found=; for python in $(CANDIDATES); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	    exec "$$python" requirements/install.py \
	      $(if $(DEVICE),--device='$(DEVICE)') $(if $(TORCH_INDEX),--torch-index='$(TORCH_INDEX)') $(TESTS); \
	  fi; \
	  found="$$found\n  $$python: $$("$$python" --version 2>&1 | head -n 1)"; \
	done; \
	printf "error: Python 3.10 or newer is needed. Found:$$found\n%s\n" \
	  "Install one (Debian, Ubuntu: sudo apt install python3 python3-venv), or name it: make setup PYTHON=/path/to/it" \
	  >&2; \
	exit 1

train: setup  ## train a model: MODEL, DATA, DATA_ROOT, NPROC, DEVICE, ARGS
	@.venv/bin/clicktrainer train --nproc-per-node '$(NPROC)' 'model=$(MODEL)' 'data=$(DATA)' \
	  $(if $(DATA_ROOT),'data.root="$(DATA_ROOT)"') $(if $(DEVICE),'device=$(DEVICE)') $(ARGS)

style: setup
	@$(RUN) ruff format --quiet --check .
	@$(RUN) ruff check --quiet .
	@$(RUN) mypy

check: style  ## format, lint, types, and the fast tests
	@$(RUN) pytest --numprocesses 2 --dist loadfile -m '$(FAST)' $(ARGS)

test: TESTS := --tests
test: style  ## the same with all tests: ARGS='tests/launch -k metrics -x'
	@$(RUN) pytest --numprocesses 2 --dist loadfile $(ARGS)

docs: setup  ## the guide as a web site: site/index.html
	@NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build

clean:  ## remove .venv and everything built (runs and data stay)
	rm -rf .venv build trainer/kernels/build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
