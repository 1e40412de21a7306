# make demo      a small Swin learns handwritten digits, by the real main job, in minutes
# make test      lint and the tests that take less than ten minutes on two cores
# make test-all  the slow ones too
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/torchrun --standalone --nproc_per_node=1

.PHONY: demo test test-all lint clean

demo: .venv/requirements
	$(RUN) main.py --cfg configs/demo.yaml

test: .venv/requirements-dev lint
	$(BIN)/python -m pytest -m "not slow"

test-all: .venv/requirements-dev lint
	$(BIN)/python -m pytest

lint: .venv/requirements-dev
	$(BIN)/ruff check .

# The stamps hold the requirements as installed: changed requirements are installed again.
.venv/requirements: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name it: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/requirements-dev: requirements-dev.txt .venv/requirements
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv demo_data
