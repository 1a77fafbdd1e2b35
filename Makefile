# make quickstart   real photos × real styles, from manifest to contact sheet; type it again to resume
# make test         the whole test suite; ARGS="-k resume" is passed to pytest
# make chaos        200 random faults over a job, and 20 over the demo model; ARGS="--seed 7" repeats those of a seed
# make gpu          the engine on this machine's GPU: gradients, speed, memory, determinism; ARGS="--stages smoke eager"
# make check        format, lint, types, import rules
# make demo-model   the embedded model, trained anew into runs/demo: hours on 2 cores
#
# Each makes .venv when there is none and installs what it needs into it, once. PYTHON=python3.12 picks another Python.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.DELETE_ON_ERROR:
.PHONY: help quickstart test chaos gpu check demo-model

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

quickstart: $(VENV)/.run
	$(BIN)/stylemill plan jobs/quickstart.yaml
	$(BIN)/stylemill run jobs/quickstart.yaml $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

chaos: $(VENV)/.test
	$(BIN)/python benchmarks/chaos.py $(ARGS)
	$(BIN)/python benchmarks/chaos.py --engine demo --faults 20 --pairs 48 $(ARGS)

gpu: $(VENV)/.run
	$(BIN)/python benchmarks/gpu.py $(ARGS)

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict
	$(BIN)/python -m pytest tests/test_layers.py

demo-model: $(VENV)/.run
	$(PIP) -e '.[train]'
	cd pipeline && $(abspath $(BIN))/python -m demo_training.train ../runs/demo

# Stamps: written after a whole installation, older than these two files when it must be renewed.
$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP) -e .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP) -e '.[test]'
	@touch $(VENV)/.run $@

# pip and not python is the target: venv writes it last, so that an interrupted one is made again.
$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { echo "stylemill needs Python 3.11 or newer; there is no $(PYTHON)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "stylemill needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name a newer one, for example: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
