# Two commands do all: `make distill` and `make test`. `make help` lists the rest.
PYTHON ?= python3
RECIPE ?= tiny
ARGS ?=
NPROC ?= 1
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
ENGINE ?= $(if $(filter tiny,$(RECIPE)),$(if $(filter-out 1,$(NPROC)),ddp))
TEACHER_DIR ?= runs/teacher
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
TORCHRUN = $(BIN)/python -m torch.distributed.run --standalone --nproc_per_node $(NPROC) -m sprint
# A file stays with one worker, so that its fixtures are made once; tests/conftest.py puts the long files first.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
LAUNCH = $(if $(filter 1,$(NPROC)),$(BIN)/sprint,$(TORCHRUN))

.PHONY: help setup distill test test-fast lint format teacher gpu-check bench bench-convert chaos clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  PYTHON=python3.12 picks the interpreter; RECIPE=0.6b the recipe; ARGS='distill.steps=400' overrides it;"
	@echo "  NPROC=2 ENGINE=fsdp2 (or ddp, zero2, zero3) starts so many processes on this machine."

setup: $(READY) ## create .venv and install everything, extras included

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "sprint needs Python 3.10 or newer; $(PYTHON) is older. Try: make setup PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[cluster,data,track,eval,dev]"
	@touch $@

distill: $(READY) ## teacher to student with RECIPE (tiny): about ten minutes on two cores; interrupted, it resumes
	$(LAUNCH) distill $(RECIPE) $(if $(ENGINE),engine=$(ENGINE)) $(ARGS)

test: $(READY) ## every test, WORKERS at once (one a core, at most 8)
	$(PYTEST)

test-fast: $(READY) ## all but the slow tests (those that start processes, run whole trainings or compile)
	$(PYTEST) -m "not slow"

.PHONY: kernels kernels-quick
kernels: $(READY) ## the numeric tests under other processors' kernels and with two threads: most of an hour on two cores
	$(BIN)/python -m tools.kernels --jobs 2

kernels-quick: $(READY) ## two of those variants on a few quick modules: about a minute
	$(BIN)/python -m tools.kernels --quick --jobs 2

lint: $(READY) ## ruff: check and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

teacher: $(READY) ## train the built-in tiny teacher anew into TEACHER_DIR: two hours or more on two cores; resumes
	test -f $(TEACHER_DIR)/vae/training.json || $(BIN)/python -m tools.make.autoencoder --out $(TEACHER_DIR)
	$(BIN)/python -m tools.make.teacher --out $(TEACHER_DIR)

.PHONY: triton-check
triton-check: $(READY) ## the GPU's own kernels by Triton's interpreter, on a CPU: installs Triton, 200 MB
	$(BIN)/python -m pip install --quiet triton
	$(PYTEST) tests/base/test_depthwise.py

gpu-check: $(READY) ## everything that needs a GPU, in at most ten minutes
	$(BIN)/python -m tools.gpu

bench: $(READY) ## speed, memory, FLOPs and precision of the step and of sampling; 20M and the built-in network
	for network in 20m tiny; do \
	  $(BIN)/python -m tools.bench.step --compile --network $$network && \
	  $(BIN)/python -m tools.bench.network --compile --network $$network && \
	  $(BIN)/python -m tools.bench.compiling --network $$network && \
	  $(BIN)/python -m tools.bench.flops --network $$network && \
	  $(BIN)/python -m tools.bench.flops --network $$network --products fastest || exit 1; done
	$(BIN)/python -m tools.bench.jvp --compile
	$(BIN)/python -m tools.bench.sampling
	$(BIN)/python -m tools.bench.memory
	$(BIN)/python -m tools.bench.memory --network 0.6b --micro-batch 0 16
	$(BIN)/python -m tools.bench.flops --network 0.6b --precision bf16
	$(BIN)/python -m tools.bench.growth
	$(BIN)/python -m tools.bench.precision

chaos: $(READY) ## kill, damage and starve runs in every way we know; nothing may be lost: some minutes
	$(BIN)/python -m tools.chaos

.PHONY: rehearsal
rehearsal: $(READY) ## the evening before: RECIPE once at its real size, with random weights; time and memory beside the plan
	$(BIN)/python -m tools.rehearsal $(RECIPE) $(ARGS)

.PHONY: ablations
ablations: $(READY) ## one step against training time, and the paper's ablations, on the tiny family: hours; ARGS=--quick for a first look
	$(BIN)/python -m tools.ablations $(ARGS)

.PHONY: fuzz
fuzz: $(READY) ## mutated files of every kind through the verbs that read them: half an hour on two cores
	$(BIN)/python -m tools.fuzz $(ARGS)

.PHONY: spread
spread: $(READY) ## how far runs of RECIPE lie apart: three seeds and other kernels, most of an hour; resumes
	$(BIN)/python -m tools.spread $(RECIPE) $(ARGS)

bench-convert: $(READY) ## speed and memory of `sprint convert` against `cp`
	$(BIN)/python -m tools.bench.convert

clean: ## remove the environment and caches, keep runs/
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
