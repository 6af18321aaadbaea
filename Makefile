# Two commands do everything: `make quickstart` runs the main job, `make test` runs the tests. Both set up what they need.

PYTHON ?= python3
VENV ?= .venv
OUT ?= out
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
CUDA := $(shell find kernels tests/emulation -name "*.cu*" -o -name "*.h" -o -name "*.cpp")

.PHONY: quickstart test test-slow pytest lint docs kills mutants wheel kernels test-gpu test-oldest sweep sweep-oldest benchmark clean

# MODEL=DIR and DATA=FILE run it from a checkpoint and a text of your own, MODEL=smollm2 from a real language model, which is fetched
quickstart: $(VENV)/.quickstart
	$(BIN)/python -m recipes.quickstart --out $(OUT) $(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data $(DATA))

test: lint pytest

# two workers with a thread each: more threads than cores slow small products down tenfold
pytest: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# further examples of kinds that `make test` has a quick one of
test-slow: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CUDA)
	$(BIN)/mypy

# the site, in out/site; a warning is an error, which --quiet would hide from the count. Left out is a notice that Material is kept until
# May 2027, and Zensical after it.
docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# kills conversion and training a hundred times each, at random moments
kills: $(VENV)/.test
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python tests/kills.py 100

# puts small slips into a copy of the code and tells which of them no test notices; ARGS="--kind operator", ARGS="--sample 20 --seed 3",
# ARGS="--random 60 --seed 3" for slips at places that nobody chose
mutants: $(VENV)/.test
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python -m mutants $(ARGS)

# builds dist/: sources and a wheel, with the CUDA kernels where nvcc is, and tries that in an environment that has nothing else, nvcc neither
wheel:
	rm -rf dist .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/pip install --quiet build twine
	.venv-wheel/bin/python -m build --sdist --wheel
	.venv-wheel/bin/twine check --strict dist/*
	$(PYTHON) -m venv --clear .venv-wheel
	PATH=$(CURDIR)/.venv-wheel/bin pip install --quiet $(TORCH) "$$(ls dist/*.whl)[convert]"
	PATH=$(CURDIR)/.venv-wheel/bin python tests/installed.py dist/*.whl

# compiles the CUDA kernels into the checkout; needs nvcc
kernels: $(VENV)/.test
	$(BIN)/python setup.py build_kernels

# needs a GPU, and the kernels
test-gpu:
	$(PYTHON) -m pip install --quiet nvidia-cuda-sanitizer-api
	$(PYTHON) -m pytest -m gpu tests

# the oldest versions that the package declares
test-oldest:
	$(MAKE) pytest VENV=.venv-oldest TORCH="torch==2.11.0 transformers==5.17.0"

# tries every architecture of the installed Transformers and writes docs/architectures.md; ARGS="--only llama" tries one
sweep: $(VENV)/.test
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python -m sweep $(ARGS)

sweep-oldest:
	$(MAKE) sweep VENV=.venv-oldest TORCH="torch==2.11.0 transformers==5.17.0"

benchmark: $(VENV)/.test
	$(BIN)/python benchmarks/attention.py --device cpu

# torch goes first: the version pinned here is enough for everything after it. Where nvcc is, installing compiles the kernels; where there
# is no GPU to run them, the quickstart leaves them out and the tests compile those of one card (the emulator runs the others' code).
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	touch $@

$(VENV)/.quickstart: $(VENV)/.torch pyproject.toml
	$(if $(shell command -v nvidia-smi),,HF_LINATTN_REQUIRE_CUDA=0) $(BIN)/pip install --quiet --editable ".[convert,recipes]"
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(if $(shell command -v nvidia-smi),,HF_LINATTN_CAPABILITIES=9.0) $(BIN)/pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-wheel $(OUT) build dist *.egg-info hf_linattn/_kernels.so
