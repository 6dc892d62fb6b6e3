# make demo   sets up what it needs (not the extras: torch alone is gigabytes), then
#             fine-tunes the embedded model
# make test   sets everything up, then runs the tests
# make lint   sets everything up, then checks style (ruff) and types (mypy)
# make setup  what the tests need: .venv/ with the package and its test and dev extras

PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo lint test

INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

setup: .venv/installed

# The stamps are written last, so an interrupted install is taken up again.
.venv/package: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'ddpo_jax needs Python 3.11 or later: make PYTHON=python3.12 setup' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv --clear .venv
	$(INSTALL) -e .
	touch $@

.venv/installed: .venv/package
	$(INSTALL) -e '.[test,dev]'
	touch $@

demo: .venv/package
	$(BIN)/python scripts/train.py --config configs/demo.py

lint: setup
	$(BIN)/python -m ruff check
	$(BIN)/python -m mypy

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
