# quickstart and test need nothing but Python >= 3.11 and a network for package installs.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Processes that share the tests, file by file; each takes up to 3 GB. On two cores a third gains nothing.
WORKERS ?= 2

.PHONY: quickstart test lint install clean

quickstart: $(VENV)/.installed
	$(VENV)/bin/retort quickstart $(ARGS)

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

install: $(VENV)/.installed

# Modules are compiled when they are first imported, as few of those that come along ever are. Where
# this is set, as in many containers, each process would compile again whatever it imports.
unexport PYTHONDONTWRITEBYTECODE

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --no-compile --editable . --constraint constraints.txt
	touch $@

# On Linux the plain wheel of torch brings CUDA; any CPU build of this version will do for the tests.
# libtpu (0.7 GB) compiles for TPUs on any machine. What the extras name is installed without retort
# itself, which would go away for a moment while it may be in use.
EXTRAS = dev torch tpu corpus
$(VENV)/.installed-dev: $(VENV)/.installed
	$(VENV)/bin/python -c 'import sys, tomllib; \
	  extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	  print(*(package for extra in sys.argv[1:] for package in extras[extra]), sep="\n")' $(EXTRAS) > $@.txt
	$(VENV)/bin/python -m pip install --quiet --no-compile --requirement $@.txt --constraint constraints.txt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
