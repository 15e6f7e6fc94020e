# `make demo` and `make test` work on a fresh machine that has Python 3.11 or later, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# many processes import the same modules: what the first has compiled is kept for the others, whatever the shell says
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-all lint install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version) if sys.version_info < (3, 11) else 0'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/distill study experiments/demo experiments/demo_traces experiments/demo_methods \
		hydra/launcher=joblib hydra.launcher.n_jobs=2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# two workers on two cores: each costs half a minute before its first test
test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" --durations=20

test-all: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

clean:
	rm -rf $(VENV) build dist *.egg-info
