# make demo      train a small Swin on handwritten digits on the CPU, in minutes
# make test      lint, type checks and the fast tests: about 4 minutes on two cores
# make test-all  the slow tests too
# make lint      ruff and mypy
# make clean     remove the virtual environment, caches and the demo's data
PYTHON ?= python3
BIN := .venv/bin
# The models of the tests are tiny: one thread per worker process is faster than several.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=worksteal

.PHONY: demo test test-all lint clean

demo: .venv/requirements
	$(BIN)/python main.py --cfg configs/demo.yaml

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)

lint: .venv/requirements-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The stamp files are newer than the requirements that are installed.
.venv/requirements: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed. Name one: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/requirements-dev: requirements-dev.txt requirements-plot.txt .venv/requirements
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv demo_data .pytest_cache .ruff_cache .mypy_cache
