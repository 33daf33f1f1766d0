"""Keyword arguments as the dataclass of a command, checked as the command checks its words."""

import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from importlib import import_module
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from sssd_zoo import configs
from sssd_zoo.cli.arguments import did_you_mean, expand_paths
from sssd_zoo.cli.commands import COMMANDS
from sssd_zoo.configs.ranges import problems
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import plain

Values = dict[str, Any]


def settings_of(command: str, values: Mapping[str, Any]) -> tuple[Any, frozenset[str]]:
    """The arguments of a command.

    Args:
        command: a key of `COMMANDS`.
        values: of its arguments by name; those of dataclasses in it as mappings or by names with dots, or the
            dataclass itself.

    Returns:
        Its dataclass, and the dotted names of those that were given.

    Raises:
        UserError: for an argument that it has not, and that names all values out of their ranges.
    """
    config = getattr(configs, COMMANDS[command].arguments)
    function = command.replace("-", "_")
    flat: Values = {}
    for name, value in flattened(values):
        if name in flat:
            raise UserError(f"sssd_zoo.{function}: {name} is given twice: give it once")
        flat[name] = value
    known = set(names_of(config))
    for name in flat:
        if name not in known:
            # Names of the function are nearer at hand than those of the command, which come after them.
            named = inspect.signature(getattr(import_module("sssd_zoo.api"), function)).parameters
            meant = did_you_mean([name], [*named, *known]) or f"; `sssd {command} --help` lists them"
            raise UserError(f"sssd_zoo.{function} has no argument {plain(name)}{meant}")
    needed = [field.name for field in fields(config) if field.default is field.default_factory is MISSING]
    if missing := [name for name in needed if name not in {key.partition(".")[0] for key in flat}]:
        raise UserError(f"sssd_zoo.{function} needs {missing[0]}, which is None or was not given")
    nested = plain_values(nested_of(flat), config)
    wrong = problems(nested, config)
    if not wrong:
        made = made_of(config, nested, None, wrong)
    if wrong:
        raise UserError("; ".join(wrong))
    return expand_paths(made), frozenset(flat)


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values by dotted names, of mappings and dataclasses those in them."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if is_dataclass(value) and not isinstance(value, (type, os.PathLike)):
            value = {field.name: getattr(value, field.name) for field in fields(value)}
        if isinstance(value, Mapping):
            yield from flattened(value, f"{name}.")
        else:
            yield name, value


def nested_of(flat: Values) -> Values:
    """Values by dotted names as mappings in mappings."""
    nested: Values = {}
    for name, value in flat.items():
        *above, last = name.split(".")
        place = nested
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    return nested


def inner_of(kind: Any) -> Any:
    """The dataclass that a field's type is or may be, or None."""
    return next(filter(is_dataclass, (kind, *get_args(kind))), None)


def names_of(config: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of a dataclass's fields; of one that is a dataclass, those in it."""
    for name, kind in get_type_hints(config).items():
        inner = inner_of(kind)
        if inner is None:
            yield f"{prefix}{name}"
        else:
            yield from names_of(inner, f"{prefix}{name}.")


def plain_values(values: Values, config: Any) -> Values:
    """The values as the command line gives them: paths as text, numbers of NumPy as Python's, lists for tuples."""
    kinds = get_type_hints(config)
    return {
        name: plain_values(value, inner_of(kinds[name])) if isinstance(value, dict) else plain_value(value, kinds[name])
        for name, value in values.items()
    }


def choices_of(kind: Any) -> tuple[Any, ...]:
    """The values of a `Literal`, or of those in a union."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(choice for option in get_args(kind) for choice in choices_of(option))


def plain_value(value: Any, kind: Any) -> Any:
    """One value, see `plain_values`."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value) is int and str(value) in choices_of(kind):  # an exit's number
        return str(value)
    if isinstance(value, (list, tuple)):
        return (tuple if get_origin(kind) is tuple else list)(plain_value(item, Any) for item in value)
    if type(value).__module__ == "numpy":
        value = value.item() if value.ndim == 0 else value.tolist()
    return float(value) if kind is float and isinstance(value, int) and not isinstance(value, bool) else value


def made_of(config: Any, values: Values, base: Any, wrong: list[str], prefix: str = "") -> Any:
    """A dataclass with these values, and others as in `base` or by default.

    Args:
        config: the dataclass.
        values: checked by `problems`.
        base: an instance of it, or None.
        wrong: gets what it refuses of values that are each in its range, and then there is no result.
        prefix: of the names in it.
    """
    kinds, changes, before = get_type_hints(config), {}, len(wrong)
    defaults = {field.name: field.default_factory for field in fields(config)}
    for name, value in values.items():
        inner = inner_of(kinds[name])
        if isinstance(value, dict) and inner is not None:
            factory: Any = defaults[name]
            start = getattr(base, name) if base is not None else factory() if callable(factory) else None
            changes[name] = made_of(inner, value, start, wrong, f"{prefix}{name}.")
        else:
            changes[name] = value
    if len(wrong) > before:
        return None
    try:
        return config(**changes) if base is None else replace(base, **changes)
    except ValueError as error:  # a SettingsError
        wrong.append(f"{prefix.removesuffix('.')}: {error}" if prefix else str(error))
        return None
