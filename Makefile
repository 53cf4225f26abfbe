# make demo   songs, dataset and a trained adapter at toy size, with nothing to download but packages
# make test   the whole test suite
# make test-processes   runs of 1, 2 and 4 processes, and of a base model spread over two
# make test-slurm   sweeps on a Slurm cluster of two nodes on this machine; needs tests/mini_slurm.sh install
# make lint   formatting, lint and types
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# three at once keep two cores busy, since some tests wait; PyTorch's own threads would only get in each other's way
TEST_WORKERS ?= 3

.PHONY: demo test test-processes test-slurm lint format clean

demo: $(VENV)/installed
	$(RUN) -m sidestep.train experiment=demo

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(TEST_WORKERS) --dist worksteal -m "not slow and not gpu and not slurm"

# one at a time: each of them is several processes
test-processes: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/test_processes.py -m slow

test-slurm: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/test_slurm.py -m slurm

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# constraints.txt pins the versions that were tested; torch first, so that nothing else decides its version
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,slurm,joblib,optuna]"
	touch $@

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
