# Everything here works in .venv, which is made when it is first needed. No path is absolute, so that the folder that
# holds the project may have any name.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
USE := $(VENV)/.use
DEV := $(VENV)/.dev
# Two makes at once must not install into one environment; where there is no flock (macOS), run one at a time.
LOCK := $(shell command -v flock >/dev/null 2>&1 && echo flock $(VENV)/.lock)

# What is installed is compiled when it is first imported (most of it never is), and that must be kept.
unexport PYTHONDONTWRITEBYTECODE
# The models that tests run are too small to gain from threads, and lose much where other work is going on.
test: export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint bench builtin clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

demo: $(USE) ## ask the built-in model what is in a picture
	$(VENV)/bin/visualglm ask --image examples/stop.png "图里有什么？"

test: lint ## lint, then every test that is neither slow nor for an accelerator
	$(PY) -m pytest -m "not slow and not gpu" --numprocesses auto --maxprocesses 4 --dist worksteal

lint: $(DEV) ## style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(DEV) ## measure the built-in model and conversion; bench/README.md names larger ones
	$(VENV)/bin/visualglm bench
	$(PY) bench/builtin_accuracy.py --scenes 1000
	$(PY) bench/convert.py

builtin: $(DEV) ## train the built-in model again, into runs/builtin, with four processes
	$(PY) -m torch.distributed.run --nproc_per_node 4 -m visualglm.cli train-builtin configs/builtin.yaml runs/builtin

clean: ## remove what make, the tests and the tools made; runs/ stays
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- environments -----------------------------------------------------------------------------------------------------

# One environment, in two steps: for demo the package without extras, which has no torch; for all else the extra [dev] on
# top. $(call install,[EXTRA]) does nothing if another make has done it while this one waited.
define install
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'visualglm needs Python 3.11 or newer, and $(PYTHON) is not; run `make PYTHON=/path/to/python3.11 …`.' >&2; \
	    exit 1; }
	@mkdir -p $(VENV)
	@$(LOCK) sh -euc 'test $@ -nt pyproject.toml && test $@ -nt constraints.txt && exit; \
	    echo "setting up $(VENV) with visualglm$(1), once; this takes a minute or two"; \
	    $(PY) -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv $(VENV); \
	    $(PY) -m pip --disable-pip-version-check install --quiet --no-compile \
	        --constraint constraints.txt --editable ".$(1)"; \
	    touch $@'
endef

$(USE): pyproject.toml constraints.txt
	$(call install)

$(DEV): $(USE)
	$(call install,[dev])
