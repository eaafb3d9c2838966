# `make demo` and `make test` set up everything they need in $(VENV), once, and then run.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= .ci/constraints.txt
DEMO_OUT ?= runs/demo
BENCH_ARGS ?=
PYTEST_ARGS ?=

# auto: use the torch that $(PYTHON) can import, install one otherwise. install: always install one.
TORCH ?= auto
# What to install: a requirement, a wheel or an address; and further arguments of that one pip call.
TORCH_SPEC ?= $(shell sed -n 's/^torch==[^ ;]*/&/p' $(CONSTRAINTS))
TORCH_PIP_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip

.DEFAULT_GOAL := help
.PHONY: help demo bench test docs notebooks wheel lint format clean
.NOTPARALLEL:

help:
	@echo 'make demo     transfer a diffusion model to a small target set; table and plots in $(DEMO_OUT)'
	@echo 'make test     run the tests on all cores (PYTEST_ARGS="..." is passed on: --run-slow=all runs the slow ones too,'
	@echo '              --numprocesses=0 all in one process)'
	@echo 'make bench    time everything here (BENCH_ARGS="--quick --json FILE ..." is passed on)'
	@echo 'make docs     build the documentation into build/docs'
	@echo 'make wheel    build a wheel for this torch and any Python from 3.10 on into dist'
	@echo 'make notebooks  make Jupyter notebooks of the examples, in build/notebooks'
	@echo 'make lint     ruff and mypy'
	@echo 'make format   let ruff rewrite the sources'
	@echo 'make clean    remove $(VENV) and all that was built'
	@echo
	@echo 'PYTHON=python3.12 chooses the interpreter. A torch (2.9 or newer) that it can import is used as it is;'
	@echo 'otherwise $(TORCH_SPEC) is installed (TORCH_SPEC=... and TORCH_PIP_ARGS="..." choose another build,'
	@echo 'TORCH=install installs one in any case). On Linux the default build brings its CUDA libraries, several GB.'

demo: $(VENV)/.demo-ready
	$(BIN)/tgdp-fast demo --out $(DEMO_OUT)

bench: $(VENV)/.demo-ready
	$(BIN)/tgdp-fast bench $(BENCH_ARGS)

# A process needs half a GB. Of options given twice the last one counts.
test: $(VENV)/.test-ready
	$(BIN)/pytest --numprocesses auto --maxprocesses 16 --dist worksteal $(PYTEST_ARGS)

docs: $(VENV)/.test-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo 'written: build/docs/index.html'

notebooks: $(VENV)/.test-ready
	@mkdir -p build/notebooks
	@for example in examples/*.py; do \
		$(BIN)/python -m jupytext --quiet --to ipynb --output build/notebooks/$$(basename $$example .py).ipynb $$example \
			|| exit 1; \
	done
	@echo 'written: build/notebooks'

lint: $(VENV)/.test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test-ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# For other environments with this minor version of torch, and any Python from 3.10 on.
wheel: $(VENV)/.torch-ready
	@rm -rf build/lib*
	TGDP_TAG=1 $(PIP) wheel --verbose --no-cache-dir --no-deps --no-build-isolation --wheel-dir dist .
	@echo "written: $$(ls -t dist/*.whl | head -n 1)"

clean:
	rm -rf $(VENV) build dist tgdp_fast.egg-info tgdp_fast/_cpu*.so tgdp_fast/_cuda*.so tgdp_fast/_not_built.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

# Without build isolation, a build uses the torch in the environment and never downloads another.
# --no-compile: Python compiles the modules that it uses, a small part of torch.
INSTALL = $(PIP) install --no-compile --no-build-isolation --constraint $(VENV)/constraints.txt --editable

NATIVE := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.inc)

# Before pip, which would show nothing of it: it finds them built.
$(VENV)/.kernels-ready: $(VENV)/.torch-ready setup.py $(NATIVE)
	@echo '[3/4] compiling the kernels: a minute or two on two cores, several with CUDA'
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/.demo-ready: $(VENV)/.kernels-ready pyproject.toml
	@echo '[4/4] installing the package and what it needs'
	@$(INSTALL) '.[plots,data]'
	@touch $@

$(VENV)/.test-ready: $(VENV)/.kernels-ready pyproject.toml
	@echo '[4/4] installing the package and what its tests need'
	@$(INSTALL) '.[plots,data,dev]'
	@# Commands that the environment of a reused torch also has count as installed: put them into this one too.
	@for tool in pytest ruff mypy; do \
		[ -x $(BIN)/$$tool ] || $(PIP) install --quiet --ignore-installed --no-deps \
			--constraint $(VENV)/constraints.txt $$tool; \
	done
	@touch $@

# Prints the lines of a .pth file that make the torch of this interpreter visible in the new environment. Unlike
# --system-site-packages this also works from an active virtual or conda environment. Fails if there is none to use.
define REUSE_TORCH
import os, sys
if sys.version_info < (3, 10):
    sys.exit("old Python")
if os.path.realpath(sys.prefix) == os.path.realpath("$(VENV)"):
    sys.exit("the environment itself")
try:
    import torch
except Exception:
    sys.exit("no torch")
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 9):
    sys.exit("torch too old")
for path in sys.path:
    if path.endswith(("site-packages", "dist-packages")):
        print(f"import site; site.addsitedir({path!r})")
endef
export REUSE_TORCH

# The constraints of the later steps name the torch found or installed here, so that no other replaces it.
$(VENV)/.torch-ready: $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit("tgdp_fast needs Python 3.10 or newer; choose one with make PYTHON=..." \
		if sys.version_info < (3, 10) else 0)'
	@echo '[1/4] an environment in $(VENV)'
	@$(PYTHON) -m venv $(VENV)
	@set -e; \
	packages=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	if [ '$(TORCH)' = auto ] && $(PYTHON) -c "$$REUSE_TORCH" > $(VENV)/reuse_torch 2> $(VENV)/no_torch; then \
		mv $(VENV)/reuse_torch "$$packages/reuse_torch.pth"; \
		echo '[2/4] using the torch of $(PYTHON)'; \
	else \
		rm -f "$$packages/reuse_torch.pth"; \
		echo '[2/4] installing $(TORCH_SPEC)'; \
		$(PIP) install --no-compile $(TORCH_PIP_ARGS) '$(TORCH_SPEC)'; \
	fi
	@# NumPy: without it torch warns while the kernels are compiled.
	@$(PIP) install --quiet --constraint $(CONSTRAINTS) 'setuptools>=77' wheel ninja numpy
	@grep -v '^torch==' $(CONSTRAINTS) > $(VENV)/constraints.txt
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
		>> $(VENV)/constraints.txt
	@touch $@
