# Every target installs what it needs into $(VENV) first; a second call finds it there.
# The frameworks of today want a newer torch than the oldest that the package itself supports.
# Another Python: make test PYTHON=python3.13 VENV=.venv-3.13
PYTHON ?= python3
VENV ?= .venv
PYTHONS ?= python3.10 python3.13

BIN := $(VENV)/bin
TORCH_FLOOR := $(shell sed -n 's/^ *"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)

.PHONY: help demo test lint docs release floor matrix clean

help:
	@echo "make demo    train the glaucoma network on synthetic pictures, minutes on two cores"
	@echo "make test    run all tests"
	@echo "make lint    ruff and mypy"
	@echo "make docs    build the documentation into docs/_build/html"
	@echo "make release  check the version and the changelog, build and check what is to be uploaded"
	@echo "make floor   run the package's tests on the oldest torch supported ($(TORCH_FLOOR))"
	@echo "make matrix  that, and all tests on the oldest and newest Python ($(PYTHONS))"
	@echo "make clean   remove environments, caches and build products"

demo: $(VENV)/.refuge
	$(BIN)/python examples/refuge/train.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/.dev
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy

docs: $(VENV)/.dev
	$(BIN)/python -m sphinx -W --keep-going docs docs/_build/html

release: $(VENV)/.dev
	$(BIN)/python .ci/check_release.py
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

matrix: floor
	@for python in $(PYTHONS); do \
		echo "== $$python"; \
		$(MAKE) test PYTHON=$$python VENV=$(VENV)-$$python || exit 1; \
	done

floor: $(VENV)-floor/.installed
	$(VENV)-floor/bin/python -m pytest -n auto --ignore tests/refuge --ignore tests/test_benchmarks.py \
		--ignore-glob 'tests/test_integrations*' --ignore tests/test_study.py \
		--ignore tests/test_data_sets.py --ignore tests/test_site.py --ignore tests/test_figures.py \
		--ignore tests/test_comparison.py --ignore tests/test_quickstart.py --ignore tests/test_ports.py

$(VENV)/.%: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e ".[$*]"
	touch $@

$(VENV)-floor/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-floor
	$(VENV)-floor/bin/python -m pip install "torch==$(TORCH_FLOOR).*" -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-* .ci/env .ci/dist dist docs/_build
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
