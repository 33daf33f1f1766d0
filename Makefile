# `make demo` and `make test` need Python 3.11 or newer and make, nothing else. PYTHON=python3.12 make demo picks another.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VENV_MIN := .venv-min
VENV_WHEEL := .venv-wheel

# What an installed wheel must do without the checkout: load the bundled weights and run them.
define TRY_WHEEL
import sssd_zoo, timm, torch
network = timm.create_model("sssd_resnet18_cifar", pretrained=True).eval()
print(sssd_zoo.__file__, tuple(network(torch.zeros(1, 3, 32, 32)).shape))
endef
export TRY_WHEEL

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-long coverage test-slow test-min wheel check-tag release lint typecheck docs clean

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

# An environment of its own, with the lowest version that pyproject.toml admits of each dependency.
$(VENV_MIN)/.installed: pyproject.toml tests/minimum_versions.py
	$(PYTHON) -m venv --clear $(VENV_MIN)
	$(PYTHON) tests/minimum_versions.py > $(VENV_MIN)/constraints.txt
	$(VENV_MIN)/bin/python -m pip install --constraint $(VENV_MIN)/constraints.txt --editable '.[dev]'
	@touch $@

venv: $(VENV)/.installed-dev ## make .venv with the package and its development tools

demo: $(VENV)/.installed ## run the whole pipeline on the bundled sample (10,000 images)
	$(BIN)/sssd fit --config train/recipes/demo.yaml --out runs/demo

test: $(VENV)/.installed-dev ## run the fast tests
	$(BIN)/python -m pytest -n auto --dist loadfile --durations=20

test-long: $(VENV)/.installed-dev ## run the tests of five seconds to a minute, which `make test` leaves out
	$(BIN)/python -m pytest -n auto --dist loadfile --durations=20 -m 'long and not slow'

coverage: $(VENV)/.installed-dev ## run the tests of `make test` and `make test-long` and print what they cover; slower
	$(BIN)/python -m pytest -n auto --dist loadfile -m 'not slow' --cov --cov-report=term:skip-covered

test-slow: $(VENV)/.installed-dev ## run every test, the slow ones too
	$(BIN)/python -m pytest -n auto --dist loadfile -m ''

test-min: $(VENV_MIN)/.installed ## run the tests of `make test` and `make test-long` with the lowest versions of the dependencies
	$(VENV_MIN)/bin/python -m pytest -n auto --dist loadfile -m 'not slow'

wheel: ## build dist/, install the wheel in an environment of its own and try it
	rm -rf dist
	$(PYTHON) -m venv --clear $(VENV_WHEEL)
	$(VENV_WHEEL)/bin/python -m pip install build
	$(VENV_WHEEL)/bin/python -m build
	$(PYTHON) -m venv --clear $(VENV_WHEEL)
	$(VENV_WHEEL)/bin/python -m pip install dist/*.whl
	cd $(VENV_WHEEL) && env -u PYTHONPATH bin/sssd models
	cd $(VENV_WHEEL) && env -u PYTHONPATH bin/python -c "$$TRY_WHEEL"

check-tag: ## check that TAG is `v` and the version in pyproject.toml
	@version="v$$(sed -n 's/^version = "\(.*\)"$$/\1/p' pyproject.toml)"; test "$$TAG" = "$$version" || \
		{ echo "error: the tag is '$$TAG' but pyproject.toml says $$version" >&2; exit 2; }

release: check-tag ## make a GitHub release of TAG with the files of dist/
	gh release create "$$TAG" --verify-tag --generate-notes dist/*

lint: $(VENV)/.installed-dev ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

typecheck: $(VENV)/.installed-dev ## check types, strictly
	$(BIN)/mypy

docs: $(VENV)/.installed-dev ## build the documentation into site/, strictly; the README's table must be current
	$(BIN)/python docs/model_table.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove the environments, caches, the site and built packages (runs/ stays)
	rm -rf $(VENV) $(VENV_MIN) $(VENV_WHEEL) dist site .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
