"""What the files around the code say agrees with the code, and with each other."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from minimum_versions import PROJECT, minimum_versions

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
FORMS = [path for path in sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")) if path.name != "config.yml"]
TARGETS = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


def parsed(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def steps(workflow: Path) -> list[dict[str, Any]]:
    return [step for job in parsed(workflow)["jobs"].values() for step in job["steps"]]


def imported_modules(folder: str) -> dict[str, Path]:
    """The modules of others that the Python files of a folder import, inside functions too, each with one such file."""
    modules = {}
    for path in (ROOT / folder).rglob("*.py"):
        if path.name == "modeling_sssd.py":
            continue  # transformers runs it, this package never does
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import(names=names):
                    modules |= {name.name.partition(".")[0]: path for name in names}
                case ast.ImportFrom(module=str(module), level=0):
                    modules[module.partition(".")[0]] = path
    ours = {"sssd_zoo", "helpers"} | {path.stem for path in (ROOT / "tests").rglob("*.py")}
    return {name: path for name, path in modules.items() if name not in sys.stdlib_module_names | ours}


def declared(*extras: str) -> set[str]:
    """The names that pyproject.toml lists as dependencies and in these extras."""
    optional = PROJECT["optional-dependencies"]
    requirements = chain(PROJECT["dependencies"], *(optional[extra] for extra in extras))
    return {canonicalize_name(Requirement(requirement).name) for requirement in requirements}


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("sssd_zoo", [extra for extra in PROJECT["optional-dependencies"] if extra != "dev"]),
        ("train", []),
        ("eval", ["export"]),
        ("docs", ["docs"]),
        ("tests", list(PROJECT["optional-dependencies"])),
    ],
)
def test_what_is_imported_is_declared(folder, extras):
    distributions = packages_distributions()
    names = declared(*extras)
    apart = {"lightly_train"}  # in an environment of its own, for a comparison
    undeclared = {
        module: str(path.relative_to(ROOT))
        for module, path in imported_modules(folder).items()
        if module not in apart
        and not names & set(map(canonicalize_name, distributions.get(module, [module])))  # of an extra: its own name
    }
    assert undeclared == {}


def test_every_dependency_has_a_lower_bound():
    every = declared(*PROJECT["optional-dependencies"]) - {PROJECT["name"]}
    assert set(map(canonicalize_name, minimum_versions())) == every


def test_python_versions_agree():
    listed = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    matrix = parsed(ROOT / ".github/workflows/tests.yml")["jobs"]["test"]["strategy"]["matrix"]["python-version"]
    assert matrix == listed
    assert SpecifierSet(PROJECT["requires-python"]) == SpecifierSet(f">={listed[0]}")


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_only_call_make(workflow):
    commands = [step["run"] for step in steps(workflow) if "run" in step]
    assert commands
    assert set(commands) <= {f"make {target}" for target in TARGETS}


def test_tests_workflow_runs_every_check():
    commands = {step.get("run") for step in steps(ROOT / ".github/workflows/tests.yml")}
    assert commands >= {f"make {check}" for check in ("lint", "typecheck", "test", "test-min", "wheel", "docs")}


def test_pre_commit_calls_make():
    local = [hook for repo in parsed(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    entries = {hook["entry"] for hook in local if "entry" in hook}
    assert entries == {"make lint", "make typecheck"}


def test_dependabot_watches_python_and_the_workflows():
    updates = parsed(ROOT / ".github/dependabot.yml")["updates"]
    assert {update["package-ecosystem"] for update in updates} == {"pip", "github-actions"}


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.name)
def test_issue_forms(form):
    content = parsed(form)
    assert content["name"]
    assert content["description"]
    fields = [field["id"] for field in content["body"]]
    assert len(set(fields)) == len(fields) > 0
