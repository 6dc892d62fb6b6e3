# make demo   sets everything up, then fine-tunes the embedded model
# make test   sets everything up, then runs the tests
# make lint   sets everything up, then checks style (ruff) and types (mypy)
# make setup  what both begin with: .venv/ with the package and its test and dev extras

PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo lint test

setup: .venv/installed

# The stamp is written last, so an interrupted install is taken up again.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'ddpo_jax needs Python 3.11 or later: make PYTHON=python3.12 setup' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	touch $@

demo: setup
	$(BIN)/python scripts/train.py --config configs/demo.py

lint: setup
	$(BIN)/python -m ruff check
	$(BIN)/python -m mypy

test: setup
	$(BIN)/python -m ruff check --quiet
	$(BIN)/python -m mypy --no-error-summary
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
