"""The valid values of each setting, stated once in its type: `lr: LearningRate` is a float from 0 to 10,000.

To a type checker the types of this module are plain numbers and lists; their second half, `Range` or `Items`, is what
`problems` checks. A dataclass that inherits from `Checked` raises `SettingsError` for wrong values. The `sssd` command
calls `problems` on its arguments first, to report all of them at once, and `files.read_json` calls it on what it read.
"""

import math
import os
import re
import types
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from numbers import Integral, Real
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Required,
    Self,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

LARGEST_COUNT = 2**31 - 1  # counts are passed on to C as an int


@dataclass(frozen=True, repr=False)
class Range:
    """The numbers from `low` to `high`.

    Attributes:
        low: the smallest.
        high: the largest.
        open_low: `low` itself is excluded.
        open_high: `high` itself is excluded.
    """

    low: float
    high: float = LARGEST_COUNT
    open_low: bool = False
    open_high: bool = False

    def __repr__(self) -> str:
        """As the help shows it behind the type."""
        if self.high == LARGEST_COUNT and not self.open_low:
            return f"of at least {self.low}"
        if self.open_low and self.open_high:
            return f"between {self.low:g} and {self.high:g}"
        low = f"above {self.low:g} and" if self.open_low else f"from {self.low}"
        return f"{low} {'to below' if self.open_high else 'up to' if self.open_low else 'to'} {self.high}"

    def problem(self, value: Any) -> str | None:
        """What is wrong with a number, or None."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        # NaN is neither above nor below anything.
        return None if above and below else f"must be a number {self!r}"


@dataclass(frozen=True, repr=False)
class Items:
    """How many items a list has, and how they follow one another.

    Attributes:
        least: smallest number of items.
        most: largest number of items.
        order: 'distinct', 'ascending' (neighbours may be equal), or any.
    """

    least: int = 0
    most: int = LARGEST_COUNT
    order: Literal["any", "distinct", "ascending"] = "any"

    def __repr__(self) -> str:
        """As the help shows it behind the type."""
        return " ".join(word for word in ("of" if self.least else "", self._count, self._order) if word)

    @property
    def _count(self) -> str:
        return f"{self.least}" if self.least == self.most else f"at least {self.least}" if self.least else ""

    @property
    def _order(self) -> str:
        return "" if self.order == "any" else self.order

    def problem(self, value: Sequence[Any]) -> str | None:
        """What is wrong with a list, or None."""
        if not self.least <= len(value) <= self.most:
            return f"must have {self._count} item{'s' if self.least != 1 else ''}"
        if self.order == "distinct" and len(set(value)) < len(value):
            return "must have distinct items"
        if self.order == "ascending" and any(a > b for a, b in pairwise(value)):
            return "must be ascending"
        return None


@dataclass(frozen=True, repr=False)
class Duration:
    """Times such as '90s', '30m', '2h' or '1h30m'."""

    def __repr__(self) -> str:
        """As the help shows it behind the type."""
        return "such as 30m, 2h or 1h30m"

    def problem(self, value: str) -> str | None:
        """What is wrong with a text, or None."""
        return None if seconds_of(value) else "must be a time such as 90s, 30m, 2h or 1h30m"


def seconds_of(text: str) -> float:
    """The seconds of a time such as '1h30m'; 0 if it is none."""
    match = re.fullmatch(r"(?:(\d{1,4})h)?(?:(\d{1,6})m)?(?:(\d{1,8})s)?", text)
    return sum(int(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Clusters = Annotated[int, Range(2)]
Channels = Annotated[int, Range(1, 65536)]
ImageChannels = Annotated[int, Range(1, 16)]
Pixels = Annotated[int, Range(1, 16384)]
QueueSize = Annotated[int, Range(1, 2**24)]
Workers = Annotated[int, Range(0, 1024)]
Port = Annotated[int, Range(1, 65535)]
Seed = Annotated[int, Range(0, 2**63 - 1)]

Fraction = Annotated[float, Range(0, 1)]
FractionBelowOne = Annotated[float, Range(0, 1, open_high=True)]
PositiveFraction = Annotated[float, Range(0, 1, open_low=True)]
ProperFraction = Annotated[float, Range(0, 1, open_low=True, open_high=True)]
Percent = Annotated[float, Range(0, 100)]
LearningRate = Annotated[float, Range(0, 10_000)]
PositiveLearningRate = Annotated[float, Range(0, 10_000, open_low=True)]
Weight = Annotated[float, Range(0, 10_000)]
Temperature = Annotated[float, Range(1e-6, 10**6)]
Positive = Annotated[float, Range(0, 1e9, open_low=True)]
Epochs = Annotated[float, Range(0)]
Minutes = Annotated[float, Range(0)]
AnchorScale = Annotated[float, Range(0, 1000, open_low=True)]

CropScale = Annotated[tuple[PositiveFraction, PositiveFraction], Items(2, 2, "ascending")]
Milestones = Annotated[list[Count], Items(order="ascending")]
Seeds = Annotated[list[Seed], Items(1, order="distinct")]
Thresholds = Annotated[list[Fraction], Items(3, 3)]
Names = Annotated[list[str], Items(1)]
DistinctNames = Annotated[list[str], Items(1, order="distinct")]
WallTime = Annotated[str, Duration()]


class SettingsError(ValueError):
    """A value that a setting cannot have; the `sssd` command reports it in one line, like a `UserError`."""


@dataclass(kw_only=True)
class Checked:
    """Base of the settings: an instance never holds a value that its field's type forbids."""

    @classmethod
    def of(cls, settings: Any) -> Self:
        """The fields of this dataclass out of settings that inherit from it."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    def __post_init__(self) -> None:
        """Raises `SettingsError` that names every invalid value."""
        if invalid := problems(vars(self), type(self)):
            raise SettingsError("; ".join(invalid))


def problems(value: Any, kind: Any, name: str = "") -> list[str]:
    """What is wrong with a value, one line per problem; [] if it has this type and is in its range.

    Args:
        value: the value to check; for a dataclass or `TypedDict`, also a mapping of its fields.
        kind: the type: numbers, strings, booleans, None, `Literal`, `Annotated`, unions, lists, tuples, dictionaries,
            `TypedDict` and `Checked` dataclasses, nested in any way. Other types are not checked.
        name: name of the value in the messages.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        wrong_type = problems(value, args[0], name)
        texts = [text for limit in args[1:] if (text := limit.problem(value))] if not wrong_type else []
        return wrong_type + [f"{name} is {_short(value)}; it {text}" for text in texts]
    if origin in (NotRequired, Required):
        return problems(value, args[0], name)
    if origin in (Union, types.UnionType):
        by_option = [problems(value, option, name) for option in args]
        if [] in by_option:
            return []
        first = next(place for place, option in enumerate(args) if option is not type(None))
        return by_option[first]
    if origin is Literal:
        return [] if value in args else [f"{name} is {_short(value)}; it must be {_choice(args)}"]
    if isinstance(kind, type) and (is_typeddict(kind) or issubclass(kind, Checked)):
        return _fields(value, kind, name)
    if (origin or kind) in (list, tuple, dict, Sequence):
        return _items(value, origin or kind, args or (Any, Any), name)
    if kind is float:
        if not isinstance(value, Real) or isinstance(value, bool):
            return _not(value, kind, name)
        return [] if _finite(value) else [f"{name} is {_short(value)}; it must be a finite number"]
    if kind is int:
        return [] if isinstance(value, Integral) and not isinstance(value, bool) else _not(value, kind, name)
    if kind is str:
        return [] if isinstance(value, (str, os.PathLike)) else _not(value, kind, name)
    if kind in (bool, type(None)):
        return [] if isinstance(value, kind) else _not(value, kind, name)
    return []


def _fields(value: Any, kind: type, name: str) -> list[str]:
    if not isinstance(value, dict):
        # A dataclass was checked when it was made.
        return [] if not is_typeddict(kind) and isinstance(value, kind) else _not(value, dict, name)
    invalid = []
    for field, field_kind in _hints(kind).items():
        inner = f"{name}.{field}" if name else field
        if field in value:
            invalid += problems(value[field], field_kind, inner)
            if issubclass(kind, Checked):
                invalid += _text_problems(value[field], inner)
        elif field in getattr(kind, "__required_keys__", ()):
            invalid.append(f"{inner} is missing")
    return invalid


def _text_problems(value: Any, name: str) -> list[str]:
    if isinstance(value, (list, tuple)):
        return [text for number, item in enumerate(value) for text in _text_problems(item, f"{name}[{number}]")]
    return _text_problem(value, name) if isinstance(value, str) else []


def _text_problem(text: str, name: str) -> list[str]:
    if not text:  # from an unset shell variable; as a path it would mean the current folder
        return [f"{name} is empty; leave it out, or give it a value"]
    return [f"{name} contains a NUL character, which no name can have"] if "\0" in text else []


def _items(value: Any, origin: Any, args: tuple[Any, ...], name: str) -> list[str]:
    if origin is dict:
        if not isinstance(value, dict):
            return _not(value, dict, name)
        return [text for key, item in value.items() for text in problems(item, args[1], f"{name}[{key!r}]")]
    if not isinstance(value, (list, tuple)):
        return _not(value, list, name)
    fixed = origin is tuple and args[-1] is not Ellipsis
    if fixed and len(args) != len(value):
        return [f"{name} is {_short(value)}; it must have {len(args)} items"]
    kinds = args if fixed else (args[0],) * len(value)
    pairs = enumerate(zip(value, kinds, strict=True))
    return [text for number, (item, kind) in pairs for text in problems(item, kind, f"{name}[{number}]")]


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _not(value: Any, kind: Any, name: str) -> list[str]:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list"}
    names |= {dict: "a mapping of names to values", type(None): "null"}
    return [f"{name or 'it'} is {_short(value)}; it must be {names.get(kind, kind)}"]


def _choice(options: tuple[Any, ...]) -> str:
    return "one of " + ", ".join(map(str, options))


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else f"{'-' if value < 0 else ''}over 10^30"
    return text if len(text) <= 60 else f"{text[:57]}..."
