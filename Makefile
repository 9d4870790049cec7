# Everything here works in .venv, which is made when it is first needed. No path is absolute, so that the folder that
# holds the project may have any name.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
USE := $(VENV)/.use
DEV := $(VENV)/.dev
# MindSpore needs an older numpy than the rest, and so an environment of its own.
MS_VENV := .venv-mindspore
MS_DEV := $(MS_VENV)/.dev
# Two makes at once must not install into one environment; where there is no flock (macOS), run one at a time.
FLOCK := $(shell command -v flock 2>/dev/null)

# What is installed is compiled when it is first imported (most of it never is), and that must be kept.
unexport PYTHONDONTWRITEBYTECODE
# The models that tests run are too small to gain from threads, and lose much where other work is going on.
test test-mindspore: export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo finetune-demo test test-mindspore lint bench builtin clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

demo: $(USE) ## ask the built-in model what is in a picture
	$(VENV)/bin/visualglm ask --image examples/stop.png "图里有什么？"

finetune-demo: $(DEV) ## teach the built-in model a new question with twenty pictures, in about two minutes
	rm -rf runs/finetune-demo
	$(PY) examples/finetune_demo.py --output runs/finetune-demo

test: lint ## lint, then every test that is neither slow nor for an accelerator
	$(PY) -m pytest -m "not slow and not gpu" --numprocesses auto --maxprocesses 4 --dist worksteal

# File by file, so that a model is compiled once, and in this order: the longest file is not the last.
test-mindspore: $(MS_DEV) ## the tests of what runs on MindSpore, in an environment of its own
	$(MS_VENV)/bin/python -m pytest tests/mindspore -m "not slow" --numprocesses auto --maxprocesses 2 \
	    --dist loadfile --no-loadscope-reorder

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
	rm -rf $(VENV) $(MS_VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- environments -----------------------------------------------------------------------------------------------------

# One environment, in two steps: for demo the package without extras, which has no torch; for all else the extra [dev] on
# top. $(call install,VENV,[EXTRA],CONSTRAINTS) does nothing if another make has done it while this one waited.
define install
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'visualglm needs Python 3.11 or newer, and $(PYTHON) is not; run `make PYTHON=/path/to/python3.11 …`.' >&2; \
	    exit 1; }
	@mkdir -p $(1)
	@$(if $(FLOCK),$(FLOCK) $(1)/.lock) sh -euc 'test $@ -nt pyproject.toml && test $@ -nt $(3) && exit; \
	    echo "setting up $(1) with visualglm$(2), once; this takes a minute or two"; \
	    $(1)/bin/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv $(1); \
	    $(1)/bin/python -m pip --disable-pip-version-check install --quiet --no-compile \
	        --constraint $(3) --editable ".$(2)"; \
	    touch $@'
endef

$(USE): pyproject.toml constraints.txt
	$(call install,$(VENV),,constraints.txt)

$(DEV): $(USE)
	$(call install,$(VENV),[dev],constraints.txt)

$(MS_DEV): pyproject.toml constraints-mindspore.txt
	$(call install,$(MS_VENV),[dev-mindspore],constraints-mindspore.txt)
