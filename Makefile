# make demo   a Pythia-410M-shaped checkpoint to GPT-NeoX and back, compared bitwise
# make quick  one case of each test that needs no torch, transformers, Ray, Chromium, store's server or kills
# make test   lint, types and tests; the report's page in your Chromium (CHROMIUM=...), or a fetched one
# make docs   the documentation at http://127.0.0.1:8000, rebuilt when a page changes
# make messages  examples for the page of messages, of the tests whose messages changed, or ARGS=tests
# make dist   the wheel and the source distribution, checked, in dist/
# make bench  times, memory and disk beside cp and others' programs, to docs/explanation/benchmarks.md
# make fuzz   damaged and hostile files of every kind, for MINUTES=10; make test has a short run
# make mutants   changes one line at a time and shows which changes no test notices: AREAS="audit batch"
# make test-neox   in the real GPT-NeoX: NEOX_HOME=..., or on its sources alone: GPT_NEOX_GIT=...
# make test-versions   in many versions of transformers
PYTHON ?= python3
DEV := .venv
DEMO := .demo
JOBS ?= 2

export NO_MKDOCS_2_WARNING = 1  # a notice about another program

.PHONY: demo quick test lint docs messages dist test-neox test-versions bench fuzz mutants clean

demo: $(DEMO)/venv/.ready
	$(DEMO)/venv/bin/python benchmarks/demo.py $(DEMO)

quick: $(DEV)/.ready
	$(DEV)/bin/python -m pytest -n $(JOBS) --quick $(ARGS)

test: lint
	-$(DEV)/bin/python tests/helpers/chromium.py
	-$(DEV)/bin/python tests/helpers/azurite.py
	$(DEV)/bin/python -m pytest -n $(JOBS)
	TRANSFORMERS=4.48 $(DEV)/bin/python -m pytest -m versions tests/versions

lint: $(DEV)/.ready
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports
	$(DEV)/bin/mkdocs build --strict --quiet

docs: $(DEV)/.ready
	$(DEV)/bin/mkdocs serve

# A release: both are built and checked here. The tests install the wheel into an empty environment and
# run tests of the source distribution; they build both again, for themselves.
dist: $(DEV)/.ready
	rm -rf dist
	$(DEV)/bin/python -m build --no-isolation
	$(DEV)/bin/python -m twine check --strict dist/*
	$(DEV)/bin/python -m pytest tests/test_distribution.py tests/test_extras.py

messages: $(DEV)/.ready
	$(DEV)/bin/python tests/helpers/message_record.py $(ARGS)

# The real GPT-NeoX. NEOX_HOME is a folder with its trees and a venv in which they run. If it does not
# exist yet, NEOX_SETUP creates it from GPT_NEOX_GIT, a git directory of EleutherAI/gpt-neox (a clone's
# .git folder, or a bare clone). Alternatively, NEOX_TREE names one tree and NEOX_PYTHON a Python that
# has DeepSpeed. With GPT_NEOX_GIT alone, the tests that only read sources run (the patcher, the tree
# reader, keys.json, the stand-ins of make test), and the others are skipped. ARGS="-k today" runs some.
# NEOX_RESUME=FOLDER records what passed at this commit: an interrupted run goes on where it stopped.
NEOX_HOME ?= .neox
GPT_NEOX_GIT ?=
NEOX_SETUP ?= $(wildcard ../shared/real_neox/setup)
test-neox: $(DEV)/.ready
	@if [ -n "$(GPT_NEOX_GIT)" ] && [ ! -d "$(GPT_NEOX_GIT)" ]; then \
	  echo "GPT_NEOX_GIT=$(GPT_NEOX_GIT): no such folder"; exit 1; fi; \
	if [ -z "$(NEOX_TREE)" ] && [ ! -x "$(NEOX_HOME)/venv/bin/python" ]; then \
	  if [ -n "$(GPT_NEOX_GIT)" ] && [ -n "$(NEOX_SETUP)" ]; then \
	    "$(NEOX_SETUP)" "$(abspath $(NEOX_HOME))" "$(abspath $(GPT_NEOX_GIT))"; \
	  elif [ -z "$(GPT_NEOX_GIT)" ]; then \
	    echo "Name GPT-NeoX: NEOX_TREE=... NEOX_PYTHON=..., or NEOX_HOME=... (CONTRIBUTING.md), or a git"; \
	    echo "directory of EleutherAI/gpt-neox:"; \
	    echo "  git clone --bare https://github.com/EleutherAI/gpt-neox gpt-neox.git"; \
	    echo "  make test-neox GPT_NEOX_GIT=gpt-neox.git"; exit 1; fi; fi
	NEOX_HOME="$(abspath $(NEOX_HOME))" NEOX_TREE="$(NEOX_TREE)" \
	  GPT_NEOX_GIT="$(if $(GPT_NEOX_GIT),$(abspath $(GPT_NEOX_GIT)))" \
	  $(DEV)/bin/python -m pytest -m neox tests $(ARGS)

# each version of transformers in an environment of its own: TRANSFORMERS="4.30 5.4" for some
test-versions: $(DEV)/.ready
	$(DEV)/bin/python -m pytest -m versions tests/versions

# the whole takes some 25 minutes and 30 GB of disk: ARGS=--quick, or --help for others. As root where
# mkfs.xfs is, a loop-mounted XFS too; with NEOX_HOME, or NEOX_TREE and NEOX_PYTHON, GPT-NeoX's exporter
bench: $(DEV)/.ready
	NEOX_HOME="$(abspath $(NEOX_HOME))" $(DEV)/bin/python benchmarks/bench.py $(ARGS)

MINUTES ?= 10
fuzz: $(DEV)/.ready
	$(DEV)/bin/python tests/fuzz/run.py $(MINUTES) $(TARGET)

# A sample of 40 mutants for each area takes hours. An interrupted run continues where it stopped.
# ARGS="--report" shows what is known, "--again" runs those again that survived, "--jobs 2", "--seed 1".
AREAS ?=
mutants: $(DEV)/.ready
	$(DEV)/bin/python -m pip install --quiet --group mutants
	$(DEV)/bin/python tests/mutants/run.py $(AREAS) $(ARGS)

# the CPU build of torch is at this version; pip 25.1 is the first to know dependency groups
$(DEV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python 3.10 or newer is needed: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(DEV)/bin/python -m pip install --quiet --editable . --group test
	touch $@

$(DEMO)/venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python 3.10 or newer is needed: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(DEMO)/venv
	$(DEMO)/venv/bin/python -m pip install --quiet --editable .
	touch $@

clean:
	rm -rf $(DEV) $(DEMO) dist site .bench .versions .neox .azurite .chromium .mutants
