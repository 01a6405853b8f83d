# make repro      bring everything up to date: train, certify, report; JOBS=2 runs two stages at once
# make publish    freeze the finished run in results/NAME/; NAME=digits names it (default: the name of its report)
# make verify     verify the published results without training: redraw, recompute, vote again; NAME=digits for one
# make redraw     bring published results up to date with new settings and a new report, without training; NAME=digits for one
# make test       run the linter and all tests that are not thorough, among them the pipeline at smoke size
# make test-fast  run the linter and the tests that are neither slow nor thorough
# make test-thorough  run the thorough tests: the longest ones and further cases, for which `make test` has no time
# make install    only create the environment: .venv with the versions in constraints.txt
# make params     compose conf/ into params.yaml, list all settings in docs/settings.md, and set the defaults of `rrcm train`; PROFILE=cifar10 for another profile
#
# Each target first creates .venv if it is missing. PYTHON=python3.12 chooses the interpreter for it.
# By default, one stage runs per GPU; without GPUs, as many as fill the cores. stages/README.md has the details.

PYTHON ?= python3
PROFILE ?= digits
JOBS ?=
NAME ?=
ROWS ?=
SEED ?=
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# the same behaviour in every shell: UTF-8 in any locale, no packages of another environment, modules compiled once
export PYTHONUTF8 := 1
export PIP_USER := 0
unexport PYTHONHOME PYTHONPATH PYTHONDONTWRITEBYTECODE

repro: $(VENV)/.installed
	@python stages/repro.py $(if $(JOBS),--jobs $(JOBS))

publish: $(VENV)/.installed
	@python stages/publish.py $(NAME)

verify: $(VENV)/.installed
	@python stages/verify.py $(NAME) $(if $(ROWS),--rows $(ROWS)) $(if $(SEED),--seed $(SEED))

redraw: $(VENV)/.installed
	@python stages/redraw.py $(NAME)

test: lint
	OMP_NUM_THREADS=1 python -m pytest -n auto --dist loadgroup -m 'not thorough'

test-thorough: lint
	OMP_NUM_THREADS=1 python -m pytest -n auto --dist loadgroup -m thorough

test-fast: lint
	OMP_NUM_THREADS=1 python -m pytest -n auto --dist loadgroup -m 'not slow and not thorough'

lint: $(VENV)/.installed-test
	ruff check .
	ruff format --check .

install: $(VENV)/.installed

params: $(VENV)/.installed
	python stages/compose.py profile=$(PROFILE)
	python stages/settings.py

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(VENV)/bin/python -m pip --version > /dev/null 2>&1 || { $(NEW_VENV); } # missing, or half-made by a killed run
	@echo "installing into $(VENV): this takes some minutes and 6 GB"
	python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@test -e .git || python -m dvc config --local core.no_scm true # an archive without git, which DVC would refuse
	@touch $@

define NEW_VENV
	rm -rf $(VENV)/bin; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null \
		|| { echo "error: $(PYTHON) is not Python 3.11 or newer; choose one with PYTHON=python3.12" >&2; exit 1; }; \
	$(PYTHON) -c 'import ensurepip' 2> /dev/null \
		|| { echo "error: $(PYTHON) lacks ensurepip, which brings pip; on Debian: apt install python3-venv" >&2; exit 1; }; \
	$(PYTHON) -m venv --clear $(VENV)
endef

$(VENV)/.installed-test: $(VENV)/.installed
	python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

.PHONY: repro publish verify redraw test test-fast test-thorough lint install params
