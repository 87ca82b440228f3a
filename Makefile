# Two commands set everything up by themselves: make demo, make test.
# Another Python: make test PYTHON=python3.12 (it gets its own .venv-3.12).
PYTHON ?= python3
PRINT_VERSION := import sys; print("%d.%d" % sys.version_info[:2])
# pyenv's python3.12 only runs once that version is chosen: choose it.
ifneq ($(shell $(PYTHON) -c '' 2>&1 | grep pyenv),)
  export PYENV_VERSION := $(shell pyenv latest $(PYTHON:python%=%))
endif
VERSION := $(shell PYENV_VERSION=$(PYENV_VERSION) $(PYTHON) -c '$(PRINT_VERSION)')
VENV := $(if $(filter python3,$(PYTHON)),.venv,.venv-$(VERSION))
BIN := $(VENV)/bin
RUNTIME := $(VENV)/installed-$(VERSION)
TESTED := $(VENV)/installed-$(VERSION)-test
# On a terminal the installers show their progress bars.
TERMINAL := $(shell [ -t 2 ] && echo yes)
PIP := $(BIN)/python -m pip install --disable-pip-version-check \
  $(if $(TERMINAL),,-qq)
UV := $(BIN)/uv pip install --python $(BIN)/python -c constraints.txt \
  $(if $(TERMINAL),,-q)

# With its bytecode kept a process starts in a third of the time, whatever the
# environment says.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test lint format clean

help:
	@echo "make demo    train on rendered rooms, evaluate, write runs/demo/report.html"
	@echo "make test    the whole test suite, offline"
	@echo "make lint    ruff check and format check"
	@echo "make format  ruff, in place"
	@echo "make clean   remove what make created (not runs/)"
	@echo "PYTHON=python3.12 chooses another interpreter (3.11 or newer)."

demo: $(RUNTIME)
	$(BIN)/python launch/demo.py --workdir=runs/demo

test: $(TESTED)
	$(BIN)/python -m pytest $(ARGS)

lint: $(TESTED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(TESTED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-* .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUNTIME): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "spatial_jax needs Python 3.11 or newer; $(PYTHON) is" \
	    "'$(VERSION)'. Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@# A .venv left by another Python version is built anew.
	@[ "$$($(BIN)/python -c '$(PRINT_VERSION)' 2>/dev/null)" = "$(VERSION)" ] || \
	  $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV) (once) ..."
	@$(PIP) uv
	@$(UV) -e .
	@touch $@

# torch comes through pip: its index may offer the small CPU build, which uv
# passes over. The marker that says which Pythons get it is in pyproject.toml.
$(TESTED): $(RUNTIME)
	@echo "Installing what the tests need ..."
	@$(PIP) --no-compile "torch==2.13.0; python_version < '3.12'"
	@$(UV) -e ".[test]"
	@touch $@
