# ftjax: every target sets up what it needs, in .venv, the first time.
#
#   PYTHON=python3.12   the Python to build .venv with (3.11 or newer)
#   HARDWARE=cpu        cpu, cuda or tpu, where the machine is not to decide
#   TESTS=tests/x.py    what `make test` runs
#   JOBS=2              how many processes it runs in

SHELL := /bin/sh
.DEFAULT_GOAL := help
.SUFFIXES:

PYTHON ?=
TESTS ?= tests
JOBS ?= 2
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
CODE := $(wildcard ftjax configs tests benchmarks experiments)

# nvidia-smi answers only where a driver and a GPU do. A TPU shows as /dev/accel0, or
# behind vfio, which other devices use too: there Google's own marks decide.
detect = if nvidia-smi -L 2>/dev/null | grep -q GPU; then echo cuda; \
  elif ls /dev/accel[0-9]* >/dev/null 2>&1; then echo tpu; \
  elif ls /dev/vfio/[0-9]* >/dev/null 2>&1 && { \
    [ -n "$$TPU_NAME$$TPU_ACCELERATOR_TYPE$$TPU_WORKER_HOSTNAMES" ] || \
    [ -e /lib/libtpu.so ] || [ -e /usr/lib/libtpu.so ]; }; then echo tpu; \
  else echo cpu; fi
HARDWARE := $(or $(HARDWARE),$(shell $(detect)))

requirements_cpu := requirements.txt
requirements_cuda := requirements-cuda.txt
requirements_tpu := requirements-tpu.txt
REQUIREMENTS := $(requirements_$(HARDWARE))
ifeq ($(REQUIREMENTS),)
$(error HARDWARE is cpu, cuda or tpu, not '$(HARDWARE)')
endif

# A stamp is written last and removed first: what was interrupted has none, and starts
# over in an empty .venv.
STAMP := $(VENV)/.installed-$(HARDWARE)
DEV_STAMP := $(VENV)/.installed-dev

.PHONY: help setup demo test test-long lint format clean

help:
	@echo 'make setup      build .venv for this machine (here: $(HARDWARE))'
	@echo 'make demo       fine-tune the model that ships with ftjax, in minutes'
	@echo 'make test       lint, types and tests'
	@echo 'make test-long  the tests that take minutes'
	@echo 'make lint       ruff and mypy'
	@echo 'make format     let ruff rewrite the code'
	@echo 'make clean      remove .venv and the caches (runs/ stays)'
	@echo
	@echo 'PYTHON=python3.12 picks the Python (3.11 or newer);'
	@echo 'HARDWARE=cpu, cuda or tpu overrides what was found.'

setup: $(STAMP)
	@:

# Prints the first Python that is new enough, or nothing. It is asked, not trusted by
# its name: version managers leave names on PATH that only print an error.
find_python = for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python); do \
  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
  then echo "$$python"; break; fi; done

$(STAMP): requirements.txt $(REQUIREMENTS)
	@python=$$($(find_python)); \
	if [ -z "$$python" ]; then \
	  echo 'error: no Python 3.11 or newer was found' >&2; \
	  echo '  looked for: $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python)' >&2; \
	  echo '  python3 is: '"$$(python3 --version 2>&1 | head -n 1)" >&2; \
	  echo '  to do:      install one, or name it: make setup PYTHON=/path/to/python3.12' >&2; \
	  exit 2; \
	fi; \
	if [ ! -f $@ ]; then \
	  echo "making $(VENV) with $$("$$python" --version)"; \
	  rm -rf $(VENV); \
	  if "$$python" -c 'import ensurepip' 2>/dev/null; then \
	    "$$python" -m venv $(VENV) || exit 2; \
	  elif "$$python" -m pip --version >/dev/null 2>&1; then \
	    "$$python" -m venv --without-pip $(VENV) && \
	    "$$python" -m pip --quiet --python $(PY) install pip || exit 2; \
	  else \
	    echo "error: $$python has neither ensurepip nor pip" >&2; \
	    echo '  to do:      install pip for it (Debian, Ubuntu: python3-venv)' >&2; \
	    exit 2; \
	  fi; \
	fi
	@rm -f $(VENV)/.installed-*
	@echo 'installing $(REQUIREMENTS) (a minute or two; with CUDA some gigabytes)'
	@$(PIP) --quiet --quiet install -r $(REQUIREMENTS)
	@touch $@
	@echo 'ready: $(PY)'

$(DEV_STAMP): $(STAMP) requirements-dev.txt
	@rm -f $@
	@echo 'installing requirements-dev.txt'
	@$(PIP) --quiet --quiet install -r requirements-dev.txt
	@touch $@

demo: setup
	@$(PY) -m ftjax.demo

lint: $(DEV_STAMP)
	$(PY) -m ruff check $(CODE)
	$(PY) -m ruff format --check $(CODE)
	$(PY) -m mypy

format: $(DEV_STAMP)
	$(PY) -m ruff check --fix $(CODE)
	$(PY) -m ruff format $(CODE)

# The tests of a file share what they make, so they stay in one process.
test: lint
	$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS)

test-long: $(DEV_STAMP)
	$(PY) -m pytest -m long $(TESTS)

clean:
	rm -rf $(VENV) .cache build dist *.egg-info
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
