# Set-up and checks. `make help` says what there is.
# The environment is .venv; what it holds follows pyproject.toml. Another PyTorch: make demo TORCH=2.11.0

TORCH ?= 2.13.0
VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

BIN := $(VENV)/bin
# torch first and held fast, so that no other package brings its own choice of it.
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c $(VENV)/constraints.txt
INSTALLED := $(VENV)/installed-torch-$(TORCH)
DEEPSPEED := $(VENV)/installed-deepspeed
TRITON := $(if $(HARMOENY_INSTALL_TRITON),$(VENV)/installed-triton)
TRITON_TESTS := tests/harmoeny/runtime/kernels tests/harmoeny/runtime/exchange/test_fused.py tests/harmoeny/runtime/exchange/test_movers.py
STYLE := $(BIN)/ruff check && $(BIN)/ruff format --check
TYPES := { $(BIN)/mypy && $(BIN)/lint-imports; }
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
LOWEST := $(VENV)-lowest
# Tests start programs and ranks; without bytecode each of them would compile all of the project's modules anew.
unexport PYTHONDONTWRITEBYTECODE
BENCHES := $(filter-out __init__,$(basename $(notdir $(wildcard scripts/bench/*.py))))

.DEFAULT_GOAL := help
.PHONY: help demo figures test test-lowest check bench validate claims clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(INSTALLED) ## install into .venv and run the main experiment: python run.py experiment=skew_sweep
	$(BIN)/python run.py experiment=skew_sweep

figures: $(INSTALLED) ## draw all figures that results/ allows into results/figures, simulating what is missing for others
	$(BIN)/python -m analysis.figures --simulate

test: $(INSTALLED) $(DEEPSPEED) $(TRITON) ## install into .venv, DeepSpeed too, and run linters, type checker and all tests
	$(STYLE) && $(TYPES)
	$(PYTEST)
	$(if $(TRITON),PYTHONPATH=$(VENV)/triton $(BIN)/python -m pytest $(TRITON_TESTS))

test-lowest: ## run the library's tests with the lowest releases that pyproject.toml claims, in $(VENV)-lowest
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed, as python3.11 or python3, or PYTHON=/its/path"; exit 1; }
	$(PYTHON) -m venv $(LOWEST)
	{ echo "torch==$(TORCH)"; $(PYTHON) -m scripts.lowest; } > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install -qq --disable-pip-version-check -c $(LOWEST)/constraints.txt -e '.[test]'
	$(LOWEST)/bin/python -m pytest tests/harmoeny tests/results_schema

check: $(INSTALLED) ## what you run while you work: linters, and beside each other the type checker and all tests that start no ranks and no other program
	$(STYLE)
	said=$$(mktemp); $(TYPES) > $$said 2>&1 & types=$$!; \
	$(PYTEST) --hypothesis-profile quick -m 'not ranks and not programs'; tests=$$?; \
	wait $$types; typed=$$?; cat $$said; rm $$said; exit $$((tests + typed))

bench: $(INSTALLED) ## measure the parts that have a time budget (scripts/bench)
	set -e; for name in $(BENCHES); do $(BIN)/python -m scripts.bench.$$name; done

validate: $(INSTALLED) ## compare the simulator with what was measured on a DGX-1, on this machine and on today's GPUs
	$(BIN)/python -m scripts.validate all

claims: $(INSTALLED) ## simulate the paper's main figure and set its claims beside what was simulated and measured here
	$(BIN)/python run.py experiment=paper_skew
	$(BIN)/python -m analysis.claims

clean: ## remove .venv, .venv-lowest and the caches of the tools; results stay
	rm -rf $(VENV) $(LOWEST) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed, as python3.11 or python3, or PYTHON=/its/path"; exit 1; }
	@echo "Installing PyTorch $(TORCH) and the project into $(VENV); the first time takes minutes"
	$(PYTHON) -m venv $(VENV)
	@echo "torch==$(TORCH)" > $(VENV)/constraints.txt
	$(INSTALL) torch
	$(INSTALL) -e '.[dev,slurm]'
	@touch $@

# For the tests of our kernels, which are interpreted here: 300 MB, so only where it is asked for. Without it they skip. In a
# folder of its own, since every process that finds it imports it, and its 3.9.0 prints lines when the process ends.
$(VENV)/installed-triton: $(INSTALLED)
	@$(INSTALL) --no-deps --target $(VENV)/triton triton || echo "Triton cannot be installed: the tests of its kernels skip"
	@touch $@

# DeepSpeed's build asks for the installed torch, hence no isolated build; without DS_BUILD_OPS it would compile CUDA.
$(DEEPSPEED): $(INSTALLED)
	@echo "Installing DeepSpeed"
	$(INSTALL) 'setuptools>=77' wheel ninja py-cpuinfo
	DS_BUILD_OPS=0 $(INSTALL) --no-build-isolation -e '.[dev,deepspeed,slurm]'
	@touch $@
