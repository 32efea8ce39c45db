# Fresh machine, two commands:      make demo      make test
#   another interpreter:            make test PYTHON=python3.12
#   CPU-only torch on a Linux box:  make demo PIP_ARGS='--extra-index-url <PyTorch CPU index>'
#   use the torch you already have: make test VENV=          (no venv, no installs, no network)
#   some tests only:                make test ARGS='tests/test_layout.py -x'
#   the slow ones, too:             make test-all
#   under other roundings:          make roundings     make roundings ARGS=tests/test_linear_solve.py
#   speed and memory:               make bench     make bench ARGS=--quick     with JAX beside torch: make bench BENCH=bench-jax
#   the site, in docs/_build/html:  make docs      with links into the docs of Python and torch: make docs INTERSPHINX=1
PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
PIP_ARGS    ?=
WORKERS     ?= 2
ARGS        ?=
BENCH       ?= bench
INTERSPHINX ?=

SHELL := /bin/bash
export PIP_DISABLE_PIP_VERSION_CHECK := 1

ifeq ($(strip $(VENV)),)
RUN         := $(PYTHON)
READY       := own-python
READY_TEST  := own-test-modules
READY_CHECK := own-check-modules
READY_BENCH := own-bench-modules
READY_DOCS  := own-docs-modules
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
RUN         := $(VENV)/bin/python
READY       := $(VENV)/.ready
READY_TEST  := $(VENV)/.ready
READY_CHECK := $(VENV)/.ready-dev
READY_BENCH := $(VENV)/.ready-$(BENCH)
READY_DOCS  := $(VENV)/.ready-docs
PIP         := $(RUN) -m pip install --quiet $(PIP_ARGS) --constraint $(CONSTRAINTS)
endif

# Says what is wrong with $(PYTHON) before anything else is tried. The one-liners run on every Python 3.
OLD_ENOUGH = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	{ echo "Python >= 3.10 is needed and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | tail -n 1). Try: make PYTHON=python3.11" >&2; exit 1; }
HAS = $(PYTHON) -c 'import importlib.util, sys; lacks = [name for name in sys.argv[1:] if not importlib.util.find_spec(name)]; \
	sys.exit("VENV= installs nothing, and $(PYTHON) lacks: " + ", ".join(lacks) if lacks else 0)'

.PHONY: demo test test-all roundings check bench docs clean own-python own-test-modules own-check-modules own-bench-modules own-docs-modules

demo: $(READY)
	$(RUN) -m diffopt demo

test test-all roundings: export OMP_NUM_THREADS := 1
test: $(READY_TEST)
	@echo "All of make test takes about 6 minutes on two quiet cores; what is slower is left to make test-all."
	$(RUN) -m pytest -n $(WORKERS) -m 'not slow' $(ARGS)

test-all: $(READY_TEST)
	@echo "All of make test-all takes about 35 minutes on two quiet cores."
	$(RUN) -m pytest -n $(WORKERS) $(ARGS)

# The same tests four times, each time with sums in another order and other kernels: no result may hang on a processor.
roundings: $(READY_TEST)
	@echo "All of make roundings takes about half an hour on two quiet cores."
	$(RUN) tests/roundings.py -n $(WORKERS) -m 'not slow' $(ARGS)

check: $(READY_CHECK)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(RUN) -m pyright --pythonpath "$$($(RUN) -c 'import sys; print(sys.executable)')"

bench: export OMP_NUM_THREADS := 1
bench: $(READY_BENCH)
	$(RUN) -m benchmarks $(ARGS)

# Every cell runs anew. While writing, DIFFOPT_DOCS_CACHE=1 runs only pages whose own cells changed (it does not see the
# modules beside them). No network without INTERSPHINX.
docs: export OMP_NUM_THREADS := 1
docs: export DIFFOPT_INTERSPHINX := $(INTERSPHINX)
docs: $(READY_DOCS)
	rm -rf docs/generated docs/_build/html
	$(RUN) -m sphinx -W --keep-going -q -E -j auto -b html -d docs/_build/doctrees docs docs/_build/html $(ARGS)
	$(RUN) docs/check_links.py docs/_build/html

$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	@$(OLD_ENOUGH)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/.ready-$(BENCH): $(VENV)/.ready
	$(PIP) --editable '.[$(BENCH)]'
	@touch $@

$(VENV)/.ready-docs: $(VENV)/.ready
	$(PIP) --editable '.[docs]'
	@touch $@

own-python:
	@$(OLD_ENOUGH)
	@$(HAS) torch numpy optree einops PIL sklearn matplotlib rich

own-test-modules: own-python
	@$(HAS) pytest xdist pytest_timeout hypothesis scipy higher

own-check-modules: own-python
	@$(HAS) ruff mypy pyright

own-bench-modules: own-python
	@$(HAS) higher torchopt

own-docs-modules: own-python
	@$(HAS) sphinx furo myst_nb sphinx_copybutton pybtex sphinx-mathjax-offline higher torchopt

clean:
	rm -rf $(if $(strip $(VENV)),$(VENV)) build dist docs/_build docs/generated torch_diffopt.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache
	find diffopt estimators tasks tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
