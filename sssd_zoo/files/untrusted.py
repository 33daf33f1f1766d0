"""Untrusted files: read within limits, and never from outside the folder that was given.

A run or a network can come from anybody. Files are checked for size before they are parsed; files to be copied (to be
published, or shown on a page) must be on a list, be regular files and not links, and lie in the folder itself.
"""

import os
import stat
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from sssd_zoo.errors import UserError
from sssd_zoo.files import atomic_write_bytes, expand_home

LARGEST_TEXT = 100_000  # bytes of a recipe
MOST_NODES = 10_000  # values of a recipe, an alias counted as all that it stands for
DEEPEST = 50  # lists and mappings within each other


def read_yaml(path: str | Path) -> Any:
    """Reads an untrusted YAML file.

    Raises:
        UserError: if it cannot be read, is not YAML, or is too large, also by its aliases.
    """
    try:
        if not Path(path).is_file():  # a device may have no end
            raise UserError(f"{path} is not a file: give a YAML file")
        with Path(path).open("rb") as file:
            text = file.read(LARGEST_TEXT + 1).decode()
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    check_yaml(text, str(path))
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # tags of objects, invalid dates
        raise UserError(f"cannot read {path} as YAML: {error}") from error


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings with the names of nested ones dotted: 'pretrain.epochs'."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def check_recipe(given: str) -> None:
    """Checks the value of `--config`, a path or YAML text, before jsonargparse parses it.

    Raises:
        UserError: see `check_yaml`; and for what is neither a file nor a mapping in YAML.
    """
    if os.path.lexists(given):
        if not Path(given).is_fifo():  # process substitution of a shell, <(...), can be read only once
            read_yaml(given)
    else:
        check_yaml(given, "--config")
        if not os.path.lexists(expand_home(given)) and not isinstance(yaml.safe_load(given), dict):
            raise UserError(f"--config {given}: there is no such file; give a recipe, a YAML file of arguments")


def check_yaml(text: str, where: str) -> None:
    """Refuses YAML that is short as text but large once parsed, or too deeply nested.

    Args:
        text: YAML text.
        where: name of its source, for errors.

    Raises:
        UserError: that says what is wrong.
    """
    if len(text) > LARGEST_TEXT:
        raise UserError(f"{where} has more than {LARGEST_TEXT:,} characters, too many for a recipe: give a smaller one")
    depth = 0
    try:
        # Events are read one by one, before any value is built.
        for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if number > MOST_NODES or depth > DEEPEST:
                raise UserError(
                    f"{where} has more than {MOST_NODES:,} values, or is nested more than {DEEPEST} levels deep"
                )
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"cannot read {where} as YAML: {error}") from error
    values, deep = (0.0, 0.0) if node is None else _extent(node, {})
    if values > MOST_NODES or deep > DEEPEST:
        raise UserError(
            f"{where} grows by its aliases to more than {MOST_NODES:,} values, or {DEEPEST} levels of nesting"
        )


def _extent(node: yaml.Node, known: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """The number of values in a node, aliases expanded, and its depth; infinite if it contains itself."""
    if id(node) not in known:
        known[id(node)] = float("inf"), float("inf")  # until it is known: an alias to itself finds this
        inner = [] if isinstance(node, yaml.ScalarNode) else node.value
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        extents = [_extent(part, known) for part in parts]
        known[id(node)] = 1 + sum(count for count, _ in extents), 1 + max((deep for _, deep in extents), default=0)
    return known[id(node)]


def fits(name: str, pattern: str) -> bool:
    """Whether a path matches a pattern part by part: `*` matches neither `/` nor names that begin with a dot."""
    parts, patterns = PurePosixPath(name).parts, PurePosixPath(pattern).parts
    return len(parts) == len(patterns) and all(
        fnmatchcase(part, glob) and (glob.startswith(".") or not part.startswith("."))
        for part, glob in zip(parts, patterns, strict=True)
    )


def hidden(name: str) -> bool:
    """Whether a path has a part that begins with a dot."""
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def files_below(root: Path) -> list[str]:
    """The sorted paths of all files below a folder; links are listed, not followed."""
    found = []
    for folder, folders, files in os.walk(root):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        found += [Path(folder, name).relative_to(root).as_posix() for name in [*files, *links]]
    return sorted(found)


def read_inside(root: Path, name: str) -> bytes:
    """The bytes of a file below a folder.

    Raises:
        UserError: if it, or a folder on the way to it, is a symbolic link, or it is no file. They are opened one in the
            other, so that none can be exchanged for a link in between.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # the user named this one: it may be a link
    try:
        *above, last = PurePosixPath(name).parts
        for part in above:
            inner = os.open(part, flags | os.O_DIRECTORY, dir_fd=folder)
            os.close(folder)
            folder = inner
        descriptor = os.open(last, flags, dir_fd=folder)
    except OSError as error:
        places = [root.joinpath(*PurePosixPath(name).parts[: depth + 1]) for depth in range(len(above) + 1)]
        link = next((place for place in places if place.is_symlink()), None)
        what = f"{root / name}: {error.strerror}" if link is None else f"{link}: it is a symbolic link"
        raise UserError(f"cannot take {what}; only files are copied and published: put one in its place") from error
    finally:
        os.close(folder)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UserError(
                f"cannot take {root / name}: it is not a regular file, and only those are copied or "
                "published: put one in its place"
            )
        return file.read()


def copy_files(root: Path, patterns: Iterable[str], folder: Path, *, follow_links: bool = False) -> None:
    """Copies the files that match one of the patterns, see `fits`, to the same paths below another folder.

    Args:
        root: to copy from.
        patterns: the list of what may be copied.
        folder: to copy into.
        follow_links: of folders of this package, whose files some installers link.

    Raises:
        UserError: if one of them, or a folder where they could be, is a link or no regular file.
    """
    allowed = set(patterns)
    above = {parent.as_posix() for pattern in allowed for parent in PurePosixPath(pattern).parents}
    for name in files_below(root):
        if any(fits(name, pattern) for pattern in allowed | above):
            atomic_write_bytes(folder / name, (root / name).read_bytes() if follow_links else read_inside(root, name))
