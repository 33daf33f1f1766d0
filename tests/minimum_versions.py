"""Prints the lowest version of each dependency that pyproject.toml admits, as pip constraints, for `make test-min`."""

import re
import tomllib
from itertools import chain
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def minimum_versions() -> dict[str, str]:
    """The lower bound of every dependency and extra, by name; those without one are left out."""
    requirements = chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    bounds = (re.match(r"([\w.-]+)(?:\[[^]]*\])?>=([\w.]+)", requirement) for requirement in requirements)
    return {bound[1]: bound[2] for bound in bounds if bound}


if __name__ == "__main__":
    print("\n".join(f"{name}=={version}" for name, version in minimum_versions().items()))
