# `make demo` and `make test` need Python 3.11 or newer and make, nothing else. PYTHON=python3.12 make demo picks another.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow lint typecheck docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

# Stamps: nothing is installed again until pyproject.toml changes.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is missing or older than Python 3.11; name another: make PYTHON=python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	@echo "Installing sssd-zoo and its dependencies into $(VENV) (torch is large: some minutes)"
	$(BIN)/python -m pip install --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/pip
	@echo "Installing sssd-zoo, its dependencies and its development tools into $(VENV) (torch is large: some minutes)"
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch $@ $(VENV)/.installed

venv: $(VENV)/.installed-dev ## make .venv with the package and its development tools

demo: $(VENV)/.installed ## run the whole pipeline on the shipped sample (10,000 images)
	$(BIN)/sssd fit --config train/recipes/demo.yaml --out runs/demo

test: $(VENV)/.installed-dev ## run the fast tests
	$(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(VENV)/.installed-dev ## run every test, the slow ones too
	$(BIN)/python -m pytest -n auto --dist loadfile -m ''

lint: $(VENV)/.installed-dev ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/.installed-dev ## check types, strictly
	$(BIN)/mypy

docs: $(VENV)/.installed-dev ## build the documentation into site/, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove .venv, caches, the site and built packages (runs/ stays)
	rm -rf $(VENV) dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
