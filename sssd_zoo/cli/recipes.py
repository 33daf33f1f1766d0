"""Recipes beside other arguments: which override which, and what `sssd fit` derives anew from a run's config.yaml.

The config.yaml of a run has all settings as resolved. Taken as they are, those that were chosen for its method would
train another one badly. A recipe that is written by hand has only what its author chose, and stays as it is.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import plain
from sssd_zoo.files import expand_home
from sssd_zoo.files.untrusted import flat, read_yaml
from sssd_zoo.pipeline.defaults import BY_METHOD, DERIVED, EPOCH_SETTINGS

# What decides the method, and then these settings.
DECIDING = ("method", "features", "init", "pretrain_model")
DECIDED = {*BY_METHOD, "method", "distill.lr", "distill.anchor"}


def outdated(recipes: list[str], typed: set[str], values: Mapping[str, Any]) -> set[str]:
    """The arguments of `sssd fit` that a recipe gives and that are to be derived anew.

    Args:
        recipes: values of `--config`.
        typed: names of the arguments on the command line.
        values: of the arguments that are given, by dotted names.
    """
    found: set[str] = set()
    for recipe in map(expand_home, recipes):
        content = read_yaml(recipe) if os.path.isfile(recipe) else None  # noqa: PTH113  of YAML text it is False
        settings = flat(content) if isinstance(content, dict) else {}
        names: set[str] = set()
        if "budget" in typed and values.get("budget") is not None:  # which chooses them
            names.update(EPOCH_SETTINGS)
        if settings.keys() >= {*BY_METHOD, *DERIVED, *DECIDING}:
            if any(values.get(name) != settings[name] for name in DECIDING):
                names |= DECIDED
            pretrained, pretrains = (given.get("features") is None for given in (settings, values))
            if pretrained != pretrains:  # only one of the two runs has settings of a pretraining
                names |= {name for name in DERIVED if name.startswith("pretrain.")}
        # Of another value, it is from a later recipe or the command line.
        found |= {name for name in names if name in settings and _alike(values.get(name), settings[name])}
    return found - typed


def check_order(given: Iterable[tuple[str, Any]]) -> None:
    """Refuses an argument before a recipe that gives it another value, such as its own `out`, and would override it.

    Args:
        given: names and values on the command line, in order; those of `--config` are files or YAML text.

    Raises:
        UserError: that names the first.
    """
    before: dict[str, Any] = {}
    for name, value in given:
        if name != "config":
            before |= flat({name: value})
            continue
        recipe = expand_home(value)
        content = read_yaml(recipe) if os.path.isfile(recipe) else None  # noqa: PTH113  of YAML text it is False
        settings = flat(content) if isinstance(content, dict) else {}
        for typed, wanted in before.items():
            if typed in settings and not _alike(wanted, settings[typed]):
                raise UserError(
                    f"--{typed} stands before --config {plain(recipe)}, which gives another {typed} and would override "
                    "it: put --config first"
                )


def _alike(value: Any, other: Any) -> bool:
    return list(value) == list(other) if isinstance(value, tuple) and isinstance(other, list) else bool(value == other)
