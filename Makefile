# make repro      train, certify and report everything that is not up to date; JOBS=2 runs two stages at once
# make publish    freeze the finished run below results/; NAME=digits names it, by default as its report
# make verify     verify the published results without training: redraw, recompute, vote again; NAME=digits for one
# make test       lint and all tests
# make test-fast  lint and the tests that take no long training
# make install    the environment alone: .venv with the versions of constraints.txt
# make params     compose conf/ into params.yaml; PROFILE=cifar10 for another profile
#
# Each of them makes .venv first. PYTHON=python3.12 chooses the interpreter for it.
# JOBS is by default the number of GPUs, else of cores. stages/README.md has the details.

PYTHON ?= python3
PROFILE ?= digits
JOBS ?=
NAME ?=
ROWS ?=
SEED ?=
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# the same in any shell: UTF-8 in any locale, and no packages of another environment
export PYTHONUTF8 := 1
export PIP_USER := 0
unexport PYTHONHOME PYTHONPATH

repro: $(VENV)/.installed
	@python stages/repro.py $(if $(JOBS),--jobs $(JOBS))

publish: $(VENV)/.installed
	@python stages/publish.py $(NAME)

verify: $(VENV)/.installed
	@python stages/verify.py $(NAME) $(if $(ROWS),--rows $(ROWS)) $(if $(SEED),--seed $(SEED))

test: lint
	OMP_NUM_THREADS=1 python -m pytest -n auto --dist loadgroup

test-fast: lint
	OMP_NUM_THREADS=1 python -m pytest -n auto --dist loadgroup -m 'not slow'

lint: $(VENV)/.installed-test
	ruff check .
	ruff format --check .

install: $(VENV)/.installed

params: $(VENV)/.installed
	python stages/compose.py profile=$(PROFILE)

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(VENV)/bin/python -m pip --version > /dev/null 2>&1 || { $(NEW_VENV); } # none, or one that was left half-made
	python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@test -e .git || python -m dvc config --local core.no_scm true # a downloaded archive: DVC would refuse to work
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

.PHONY: repro publish verify test test-fast lint install params
