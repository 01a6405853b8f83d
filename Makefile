# make repro   everything: environment, then the whole pipeline (dvc repro)
# make test    everything: environment, then lint and tests
# make test-fast  the tests that take seconds, for the inner loop
# make install  the environment alone
# make params  compose conf/ into params.yaml; PROFILE=cifar10 for another profile

PYTHON ?= python3
PROFILE ?= digits
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

repro: $(VENV)/.installed
	dvc repro

test: $(VENV)/.installed-test
	ruff check .
	ruff format --check .
	OMP_NUM_THREADS=1 python -m pytest -n auto --dist loadgroup

.PHONY: test-fast
test-fast: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 python -m pytest -n auto --dist loadgroup -m "not slow"

install: $(VENV)/.installed

params: $(VENV)/.installed
	python stages/compose.py profile=$(PROFILE)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rrcm needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

.PHONY: repro test install params
