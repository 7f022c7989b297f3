# Needs make and python3 (3.11 or newer) alone; everything else goes into .venv*.
#   make demo      merge and evaluate the built-in checkpoints
#   make test      the tests
#   make interop   the tests against transformers' own classes, Flax ones (4.57) and torch ones (5), peft's, and TPUs' compiler
#   make fuzz      ten minutes of inputs for the readers of weight files, found by coverage
#   make faults    the nightly run: kills, failing disks and hostile files by thousands, and the same ten minutes
#   make check     formatter, linter, type checker
#   make docs      the documentation, into docs/_build/html; warnings are errors
#   make package   wheel and sdist, checked, installed and tried from outside the checkout
#   make clean     remove the environments and caches

PYTHON ?= python3
VENV ?= .venv
FLAX_VENV ?= .venv-flax
TORCH_VENV ?= .venv-torch
TPU_VENV ?= .venv-tpu
FUZZ_VENV ?= .venv-fuzz
DOCS_VENV ?= .venv-docs
PACKAGE_VENV ?= .venv-package
JOBS ?= 2
# For each of the three readers.
FUZZ_SECONDS ?= 200
# Files and folders of tests, and options of pytest; none is all tests.
TESTS ?=

VENVS := $(VENV) $(FLAX_VENV) $(TORCH_VENV) $(TPU_VENV) $(FUZZ_VENV) $(DOCS_VENV) $(PACKAGE_VENV)
PINS := pyproject.toml constraints.txt
FLAX_PINS := tests/interop/constraints-flax.txt
# A comma cannot be written in the arguments of call.
comma := ,
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test interop interop-flax interop-torch interop-tpu fuzz faults check docs package clean

demo: $(VENV)/.demo
	$(VENV)/bin/python -m nufilt_jax.merge --model tiny

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest --numprocesses $(JOBS) --dist loadfile --quiet $(TESTS)

interop: interop-flax interop-torch interop-tpu

interop-flax: $(FLAX_VENV)/.done
	$(FLAX_VENV)/bin/python -m pytest --quiet $(wildcard tests/interop/test_flax_*.py)

interop-torch: $(TORCH_VENV)/.done
	$(TORCH_VENV)/bin/python -m pytest --quiet $(wildcard tests/interop/test_torch_*.py)

interop-tpu: $(TPU_VENV)/.done
	$(TPU_VENV)/bin/python -m pytest --quiet $(wildcard tests/interop/test_tpu_*.py)

fuzz: $(FUZZ_VENV)/.done
	$(FUZZ_VENV)/bin/python -m benchmarks.faults.fuzz --seconds $(FUZZ_SECONDS) --json fuzz.json

faults: $(FUZZ_VENV)/.done
	$(FUZZ_VENV)/bin/python -m benchmarks.study.faults --fuzz-seconds $(FUZZ_SECONDS) --json faults.json

check: $(VENV)/.dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

docs: $(DOCS_VENV)/.done
	$(DOCS_VENV)/bin/python -m sphinx --builder html --fail-on-warning --keep-going --quiet docs docs/_build/html
	@echo "docs/_build/html/index.html"

package: $(PACKAGE_VENV)/.done
	rm -rf dist
	$(PACKAGE_VENV)/bin/python -m build --outdir dist .
	$(PACKAGE_VENV)/bin/python -m twine check --strict dist/*
	$(PACKAGE_VENV)/bin/python -m pip install --quiet --force-reinstall --no-deps dist/*.whl
	cd / && $(CURDIR)/$(PACKAGE_VENV)/bin/python $(CURDIR)/tests/wheel.py

clean:
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .hypothesis dist build docs/_build docs/notebooks
	find nufilt_jax tests benchmarks notebooks -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call require,COMMAND): fails with one line unless it is a Python that this package runs on.
require = $(1) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "make: $(1) is $$($(1) --version 2>/dev/null || echo not a Python that runs), but Python 3.11 or newer" \
	"is needed: name another with make PYTHON=COMMAND; an old environment goes with make clean" >&2; exit 1; }

# $(call install,CONSTRAINTS,WHAT...): pip into the environment of the stamp that is the target.
define install
@$(call require,$(@D)/bin/python)
@echo "Installing into $(@D); the first time takes a minute or more."
@$(@D)/bin/python -m pip install --quiet --constraint $(1) $(2)
@touch $@
endef

$(VENVS:=/bin/python): %/bin/python:
	@$(call require,$(PYTHON))
	@$(PYTHON) -m venv $* || { rm -rf $*; exit 1; }

$(VENV)/.demo: $(PINS) | $(VENV)/bin/python
	$(call install,constraints.txt,--editable '.[eval$(comma)plots]')

$(VENV)/.dev: $(PINS) | $(VENV)/bin/python
	$(call install,constraints.txt,--editable '.[dev]')
	@touch $(VENV)/.demo

$(FLAX_VENV)/constraints.txt: constraints.txt $(FLAX_PINS) | $(FLAX_VENV)/bin/python
	@awk -F '==' 'NR == FNR { pinned[$$1]; print; next } !($$1 in pinned)' $(FLAX_PINS) constraints.txt > $@

$(FLAX_VENV)/.done: $(FLAX_VENV)/constraints.txt $(PINS)
	$(call install,$(FLAX_VENV)/constraints.txt,--editable '.[test]' transformers pillow)

$(FUZZ_VENV)/.done: $(PINS) | $(FUZZ_VENV)/bin/python
	$(call install,constraints.txt,--editable '.[fuzz]')

$(DOCS_VENV)/.done: $(PINS) | $(DOCS_VENV)/bin/python
	$(call install,constraints.txt,--editable '.[docs]')

$(PACKAGE_VENV)/.done: $(PINS) | $(PACKAGE_VENV)/bin/python
	$(call install,constraints.txt,'.[eval]' build twine)

$(TORCH_VENV)/.done: $(PINS) | $(TORCH_VENV)/bin/python
	$(call install,constraints.txt,--editable '.[test$(comma)torch]')

$(TPU_VENV)/.done: $(PINS) | $(TPU_VENV)/bin/python
	$(call install,constraints.txt,--editable '.[test$(comma)tpu]')
