# make quickstart: a teacher, a student and a distilled student in minutes, on any machine.   make test: everything that must hold.   make mutants: that the tests would notice.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
MEGATRON ?= megatron-core==0.16.1
BIN := $(VENV)/bin

.PHONY: install quickstart test mutants drill lint clean

# On a machine without a GPU, PIP_INDEX_URL_TORCH may name an index that holds PyTorch's CPU builds.
$(VENV)/.installed: setup.py megakd/__init__.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(if $(PIP_INDEX_URL_TORCH),--index-url $(PIP_INDEX_URL_TORCH)) "$(TORCH)"
	$(BIN)/pip install --quiet "$(MEGATRON)" -e ".[test]"
	touch $@

install: $(VENV)/.installed

quickstart: install
	$(BIN)/python scripts/quickstart.py --out quickstart

lint: install
	$(BIN)/ruff check .

test: install lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

# Changes that the tests must notice, each in a copy of the tree: many minutes. WORDS="optimizer seed" takes those that hold one.
mutants: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants/run.py $(WORDS)

# Kills, signals, a full disk, locks, damage, restarts, two machines, and first more hostile files than `make test` and the whole quick start: hours. WORDS="signals lock" takes some of it;
# docs/reliability.md has the figures.
drill: install
	OMP_NUM_THREADS=1 MEGAKD_FUZZ=4 $(BIN)/python -m pytest -q tests/test_fuzz.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow tests/test_readme.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/drills/run.py $(WORDS)

clean:
	rm -rf $(VENV) quickstart
