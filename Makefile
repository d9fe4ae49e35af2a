# make demo and make test are all a newcomer needs. Both make the environment, build and run.
#
#   PYTHON=python3.12   another Python (>= 3.10)
#   TORCH=torch==2.11.0 another PyTorch (>= 2.11), or the path of a wheel
#   VENV=FOLDER         another place for the environment
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE := constraints.txt CMakeLists.txt setup.py pyproject.toml $(shell find csrc kernels -type f -not -name '*.pyc')
FORMATTED := $(shell find csrc kernels/cuda tests/csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name "*.cuh" -o -name "*.inc")

.PHONY: demo test lint build format clean

demo: build
	$(BIN)/spos-fast demo

# A process a core, each with whole files, so that what a file's tests share is made once. Plain pytest takes turns.
test: build
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy spos_fast bench
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

build: $(VENV)/.built

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "spos_fast needs Python >= 3.10; name one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	@touch $@

# What the build needs comes first: without build isolation pip does not fetch it.
$(VENV)/.built: $(VENV)/.torch $(NATIVE)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel pybind11 cmake ninja
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e ".[dev]"
	@$(BIN)/python -c 'from spos_fast import native; print("spos_fast:", native.build_info()["summary"])'
	@touch $@

clean:
	rm -rf build $(VENV) *.egg-info spos_fast/_generated_build spos_fast/*.so
